"""Scores and exact top-k of key blocks, straight into sorted lists.

Two kernels, for as many heads at a time as a bounded scratch holds, so that the scores of the whole call never exist. One
scores tiles of query blocks against tiles of key blocks and stores each score as an unsigned number of the same order. In the
other a warp holds all numbers of one row in its registers, finds the kept-th largest bit by bit, and writes those above it
and the first of those equal to it in ascending order.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
import triton
import triton.language as tl

# Query and key blocks scored by a program.
ROWS, COLUMNS = 64, 64
# Key blocks that fit into the registers of a warp: a row of 4,096 numbers is 128 for each thread.
MOST_COLUMNS = 4096
# Bytes of scores at once: the L2 cache of an H100 holds them.
SCRATCH_BYTES = 2**25


@triton.jit(do_not_specialize=["first_pair", "n_rows", "n_columns", "stride_row", "protected"])
def _blocksparse_score_kernel(
    q_ptr, k_ptr, number_ptr, first_pair, n_rows, n_columns, stride_row, protected, order,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    place = tl.program_id(2).to(tl.int64)
    pair = first_pair + place
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    offs_d = tl.arange(0, D_PAD)
    is_row, is_column, is_channel = (rows < n_rows)[:, None], (columns < n_columns)[:, None], (offs_d < D)[None, :]
    q = tl.load(q_ptr + (pair * n_rows + rows[:, None]) * D + offs_d[None, :], mask=is_row & is_channel, other=0.0)
    at = ((pair // GROUP) * n_columns + columns[:, None]) * D + offs_d[None, :]
    k = tl.load(k_ptr + at, mask=is_column & is_channel, other=0.0)
    score = tl.dot(q * order, k.T, input_precision=PRECISION)  # [ROWS, COLUMNS]
    # Adding 0 turns -0 into +0, which compares equal to it.
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    number = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    is_first = (score != score) | (columns < protected)[None, :]
    number = tl.where(is_first, 0xFFFFFFFF, number).to(tl.uint32)
    at = (place * n_rows + rows[:, None]) * stride_row + columns[None, :]
    tl.store(number_ptr + at, number.to(tl.int32, bitcast=True), mask=is_row & (columns < n_columns)[None, :])


@triton.jit(do_not_specialize=["first_row", "n_columns", "stride_row", "kept"])
def _blocksparse_keep_kernel(
    number_ptr, list_ptr, first_row, n_columns, stride_row, kept, WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    is_column = columns < n_columns
    # No score is as low as the 0 of a column that does not exist.
    number = tl.load(number_ptr + row * stride_row + columns, mask=is_column, other=0).to(tl.uint32, bitcast=True)
    threshold = tl.sum(columns * 0).to(tl.uint32)
    bit = threshold + (1 << 31)
    for _ in range(32):
        higher = threshold | bit
        count = tl.sum((number >= higher).to(tl.int32))
        threshold = tl.where(count >= kept, higher, threshold)
        bit = bit >> 1
    is_above = number > threshold
    is_equal = (number == threshold) & is_column
    wanted = kept - tl.sum(is_above.to(tl.int32))
    is_chosen = is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= wanted))
    place = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(list_ptr + (first_row + row) * kept + place, columns, mask=is_chosen)


def launch_select(q: torch.Tensor, k: torch.Tensor, kept: int, protected: int, order: float) -> torch.Tensor:
    """The chosen key blocks, int32 [B, H, N_q, kept], ascending; q and k float32 and contiguous, N_k up to MOST_COLUMNS."""
    batch, heads, n_rows, head_dim = q.shape
    n_columns = k.shape[2]
    lists = torch.empty(batch, heads, n_rows, kept, device=q.device, dtype=torch.int32)
    # Rows on 16-byte boundaries.
    stride_row = triton.cdiv(n_columns, 4) * 4
    pairs = batch * heads
    step = max(1, min(pairs, SCRATCH_BYTES // (4 * n_rows * stride_row)))
    numbers = torch.empty(step * n_rows * stride_row, device=q.device, dtype=torch.int32)
    # Powers of two from 512 on, four kernels in all: a narrower one is not noticeably faster.
    width = max(triton.next_power_of_2(n_columns), 512)
    # Three bfloat16 parts of each operand and the six products that count: float32 on the tensor cores. The interpreter
    # does not know it.
    precision = "bf16x6" if q.is_cuda else "ieee"
    with torch.cuda.device_of(q):
        for first in range(0, pairs, step):
            count = min(step, pairs - first)
            _blocksparse_score_kernel[(triton.cdiv(n_columns, COLUMNS), triton.cdiv(n_rows, ROWS), count)](
                q, k, numbers, first, n_rows, n_columns, stride_row, protected, order,
                GROUP=heads // k.shape[1], ROWS=ROWS, COLUMNS=COLUMNS, D=head_dim,
                D_PAD=max(triton.next_power_of_2(head_dim), 16), PRECISION=precision, num_warps=4)
            _blocksparse_keep_kernel[(count * n_rows,)](
                numbers, lists, first * n_rows, n_columns, stride_row, kept, WIDTH=width, num_warps=1)
    return lists
