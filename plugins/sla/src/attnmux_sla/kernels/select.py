"""Scores and exact top-k of the key blocks, straight into sorted lists.

One program scores some query blocks of a head against all its key blocks, into scratch memory of its own that it uses again
for its next ones, so that no score matrix of the sequence exists. A score becomes an unsigned number of the same order;
its kept-th largest is found two bits at a time; then the numbers above it, and the first of those equal to it, are
written in ascending order.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows", "n_columns", "n_tiles", "tiles_per_pair", "kept", "protected", "stride_scratch"])
def _sla_select_kernel(
    q_ptr, k_ptr, scratch_ptr, list_ptr, n_rows, n_columns, n_tiles, tiles_per_pair, kept, protected, stride_scratch, order,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, SCAN: tl.constexpr,
    D: tl.constexpr,
):
    offs_r = tl.arange(0, ROWS)
    offs_c = tl.arange(0, COLUMNS)
    offs_s = tl.arange(0, SCAN)
    scratch = scratch_ptr + (tl.program_id(0).to(tl.int64) * ROWS + offs_r[:, None]) * stride_scratch
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        pair = (tile // tiles_per_pair).to(tl.int64)
        rows = (tile % tiles_per_pair) * ROWS + offs_r
        is_row = (rows < n_rows)[:, None]
        q_base = q_ptr + (pair * n_rows + rows[:, None]) * D
        for start in range(0, n_columns, COLUMNS):
            columns = start + offs_c
            k_base = k_ptr + ((pair // GROUP) * n_columns + columns[None, :]) * D
            score = tl.zeros([ROWS, COLUMNS], tl.float32)
            for d in range(0, D, STEP):
                offs_d = d + tl.arange(0, STEP)
                is_channel = offs_d < D
                q = tl.load(q_base + offs_d[None, :], mask=is_row & is_channel[None, :], other=0.0)
                at = k_base + offs_d[:, None]
                k = tl.load(at, mask=(columns < n_columns)[None, :] & is_channel[:, None], other=0.0)
                score = tl.dot(q * order, k, score, input_precision="ieee")
            # Adding 0 turns -0 into +0, which compares equal to it.
            bits = (score + 0.0).to(tl.uint32, bitcast=True)
            number = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
            is_first = (score != score) | (columns < protected)[None, :]
            number = tl.where(is_first, 0xFFFFFFFF, number).to(tl.uint32)
            tl.store(scratch + columns[None, :], number.to(tl.int32, bitcast=True), mask=(columns < n_columns)[None, :])
        # Threads read what others wrote.
        tl.debug_barrier()
        threshold = tl.zeros([ROWS], tl.uint32)
        unit = tl.full([ROWS], 1 << 30, tl.uint32)
        for _ in range(16):
            first, second, third = threshold + unit, threshold + 2 * unit, threshold + 3 * unit
            above_1 = tl.zeros([ROWS, SCAN], tl.int32)
            above_2 = tl.zeros([ROWS, SCAN], tl.int32)
            above_3 = tl.zeros([ROWS, SCAN], tl.int32)
            for start in range(0, n_columns, SCAN):
                columns = start + offs_s
                number = tl.load(scratch + columns[None, :], mask=(columns < n_columns)[None, :], other=0)
                number = number.to(tl.uint32, bitcast=True)
                above_1 += (number >= first[:, None]).to(tl.int32)
                above_2 += (number >= second[:, None]).to(tl.int32)
                above_3 += (number >= third[:, None]).to(tl.int32)
            threshold = tl.where(tl.sum(above_1, 1) >= kept, first, threshold)
            threshold = tl.where(tl.sum(above_2, 1) >= kept, second, threshold)
            threshold = tl.where(tl.sum(above_3, 1) >= kept, third, threshold)
            unit = unit >> 2
        above = tl.zeros([ROWS, SCAN], tl.int32)
        for start in range(0, n_columns, SCAN):
            columns = start + offs_s
            number = tl.load(scratch + columns[None, :], mask=(columns < n_columns)[None, :], other=0)
            above += (number.to(tl.uint32, bitcast=True) > threshold[:, None]).to(tl.int32)
        equals_wanted = kept - tl.sum(above, 1)
        equals_seen = tl.zeros([ROWS], tl.int32)
        written = tl.zeros([ROWS], tl.int32)
        lists = list_ptr + (pair * n_rows + rows[:, None]) * kept
        for start in range(0, n_columns, SCAN):
            columns = start + offs_s
            is_column = (columns < n_columns)[None, :]
            number = tl.load(scratch + columns[None, :], mask=is_column, other=0).to(tl.uint32, bitcast=True)
            is_equal = ((number == threshold[:, None]) & is_column).to(tl.int32)
            rank = equals_seen[:, None] + tl.cumsum(is_equal, 1)
            is_chosen = (number > threshold[:, None]) | ((is_equal > 0) & (rank <= equals_wanted[:, None]))
            chosen = is_chosen.to(tl.int32)
            place = written[:, None] + tl.cumsum(chosen, 1) - 1
            tl.store(lists + place, tl.broadcast_to(columns[None, :], (ROWS, SCAN)), mask=is_chosen & is_row)
            equals_seen += tl.sum(is_equal, 1)
            written += tl.sum(chosen, 1)
        # The next tile writes where this one still reads.
        tl.debug_barrier()
