"""Scores and exact top-k of key blocks, straight into sorted lists.

A program scores some query blocks of a head against all its key blocks, into scratch memory of its own that it uses again for its
next ones, so that no score matrix of the sequence exists. A score becomes an unsigned number of the same order; all numbers of
a row lie in registers while its kept-th largest is found bit by bit; then those above it, and the first of those equal to
it, are written in ascending order.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
import triton
import triton.language as tl

# Query blocks of a program (a product needs 16) and key blocks scored at once; warps, each of which searches a row.
ROWS, COLUMNS, WARPS = 16, 64, 8
# Programs at most, four on each multiprocessor of an H100: scratch is 16 rows for each of them.
PROGRAMS = 528
# Key blocks that fit into registers: a row of 4,096 numbers is 128 registers of 32 threads.
MOST_COLUMNS = 4096


@triton.jit(do_not_specialize=["n_rows", "n_columns", "n_tiles", "tiles_per_pair", "kept", "protected"])
def _blocksparse_select_kernel(
    q_ptr, k_ptr, scratch_ptr, list_ptr, n_rows, n_columns, n_tiles, tiles_per_pair, kept, protected, order,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SEARCH: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr,
):
    offs_r = tl.arange(0, ROWS)
    offs_c = tl.arange(0, COLUMNS)
    offs_d = tl.arange(0, D_PAD)
    offs_w = tl.arange(0, WIDTH)
    scratch = scratch_ptr + (tl.program_id(0).to(tl.int64) * ROWS + offs_r[:, None]) * WIDTH
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        pair = (tile // tiles_per_pair).to(tl.int64)
        rows = (tile % tiles_per_pair) * ROWS + offs_r
        is_row = (rows < n_rows)[:, None]
        at = (pair * n_rows + rows[:, None]) * D + offs_d[None, :]
        q = tl.load(q_ptr + at, mask=is_row & (offs_d < D)[None, :], other=0.0) * order
        for start in range(0, n_columns, COLUMNS):
            columns = start + offs_c
            is_column = columns < n_columns
            offsets = ((pair // GROUP) * n_columns + columns[:, None]) * D + offs_d[None, :]
            k = tl.load(k_ptr + offsets, mask=is_column[:, None] & (offs_d < D)[None, :], other=0.0)
            # Adding 0 turns -0 into +0, which compares equal to it.
            score = tl.dot(q, k.T, input_precision="ieee") + 0.0  # [ROWS, COLUMNS]
            bits = score.to(tl.uint32, bitcast=True)
            number = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
            is_first = (score != score) | (columns < protected)[None, :]
            number = tl.where(is_first, 0xFFFFFFFF, number).to(tl.uint32)
            tl.store(scratch + columns[None, :], number.to(tl.int32, bitcast=True), mask=is_column[None, :])
        # Threads read what others wrote.
        tl.debug_barrier()
        for first in range(0, ROWS, SEARCH):
            search = first + tl.arange(0, SEARCH)
            numbers = scratch_ptr + (tl.program_id(0).to(tl.int64) * ROWS + search[:, None]) * WIDTH + offs_w[None, :]
            # No score is as low as the 0 of a column that does not exist.
            number = tl.load(numbers, mask=(offs_w < n_columns)[None, :], other=0).to(tl.uint32, bitcast=True)
            threshold = tl.zeros([SEARCH], tl.uint32)
            bit = tl.full([SEARCH], 1 << 31, tl.uint32)
            for _ in range(32):
                higher = threshold | bit
                count = tl.sum((number >= higher[:, None]).to(tl.int32), 1)
                threshold = tl.where(count >= kept, higher, threshold)
                bit = bit >> 1
            is_above = number > threshold[:, None]
            is_equal = (number == threshold[:, None]) & (offs_w < n_columns)[None, :]
            wanted = kept - tl.sum(is_above.to(tl.int32), 1)
            is_chosen = is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 1) <= wanted[:, None]))
            place = tl.cumsum(is_chosen.to(tl.int32), 1) - 1
            row = (tile % tiles_per_pair) * ROWS + search
            lists = list_ptr + (pair * n_rows + row[:, None]) * kept + place
            tl.store(lists, tl.broadcast_to(offs_w[None, :], (SEARCH, WIDTH)), mask=is_chosen & (row < n_rows)[:, None])
        # The next tile writes where this one still reads.
        tl.debug_barrier()


def launch_select(q: torch.Tensor, k: torch.Tensor, kept: int, protected: int, order: float) -> torch.Tensor:
    """The chosen key blocks, int32 [B, H, N_q, kept], ascending; q and k float32 and contiguous, N_k up to MOST_COLUMNS."""
    batch, heads, n_rows, head_dim = q.shape
    n_columns = k.shape[2]
    lists = torch.empty(batch, heads, n_rows, kept, device=q.device, dtype=torch.int32)
    tiles_per_pair = triton.cdiv(n_rows, ROWS)
    n_tiles = batch * heads * tiles_per_pair
    programs = min(n_tiles, PROGRAMS)
    # A power of two: one kernel for each.
    width = max(triton.next_power_of_2(n_columns), 128)
    scratch = torch.empty(programs * ROWS * width, device=q.device, dtype=torch.int32)
    with torch.cuda.device_of(q):
        _blocksparse_select_kernel[(programs,)](
            q, k, scratch, lists, n_rows, n_columns, n_tiles, tiles_per_pair, kept, protected, order,
            GROUP=heads // k.shape[1], ROWS=ROWS, SEARCH=WARPS, COLUMNS=COLUMNS, WIDTH=width, D=head_dim,
            D_PAD=max(triton.next_power_of_2(head_dim), 16), num_warps=WARPS)
    return lists
