"""The transposed lists in four launches: count, scan over rows, scan over keys, fill. No atomics, no sort, no host.

Query blocks are dealt out in chunks of ROWS. A program walks the rows of its chunk one after the other and keeps a counter
for every key block; within a row the keys differ, so all of them are counted at once. The counters of a chunk, summed over
the chunks before it, are where its entries of each key block begin, so that entries come out ascending.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
import triton
import triton.language as tl

from attnmux_blocksparse.kernels.arguments import broadcast_strides
from attnmux_blocksparse.prepare import HOT_FACTOR

# The counters take 4 / ROWS bytes for each pair of blocks: 1 MB a head at 2,048 x 2,048.
ROWS = 16


@triton.jit(do_not_specialize=["stride_list_b", "stride_list_h", "stride_list_q", "stride_count_b", "stride_count_h",
                               "n_heads", "n_rows", "n_keys", "n_entries"])
def _transpose_rows_kernel(
    list_ptr, count_ptr, counter_ptr, offset_ptr, entry_ptr,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
    n_heads, n_rows, n_keys, n_entries,
    ROWS: tl.constexpr, COLS: tl.constexpr, FILL: tl.constexpr,
):
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // n_heads
    head = bh % n_heads
    lists = list_ptr + batch * stride_list_b + head * stride_list_h + chunk.to(tl.int64) * ROWS * stride_list_q
    counts = count_ptr + batch * stride_count_b + head * stride_count_h
    counters = counter_ptr + (bh * tl.num_programs(0) + chunk) * n_keys
    offsets = offset_ptr + bh * (n_keys + 1)
    entries = entry_ptr + bh * n_entries
    offs = tl.arange(0, COLS)
    for row in range(chunk * ROWS, tl.minimum((chunk + 1) * ROWS, n_rows)):
        n = tl.load(counts + row)
        for start in range(0, n, COLS):
            mask = start + offs < n
            key = tl.load(lists + start + offs, mask=mask, other=0)
            # volatile: the row before may have written here
            at = tl.load(counters + key, mask=mask, other=0, volatile=True)
            if FILL:
                tl.store(entries + tl.load(offsets + key, mask=mask, other=0) + at, row, mask=mask)
            tl.store(counters + key, at + 1, mask=mask)
        lists += stride_list_q
        tl.debug_barrier()


@triton.jit(do_not_specialize=["n_chunks", "n_keys"])
def _transpose_scan_rows_kernel(counter_ptr, offset_ptr, n_chunks, n_keys, CHUNKS: tl.constexpr, KEYS: tl.constexpr):
    """Counters of every chunk to the sum of those before; the sum of all of them to offsets[key + 1]."""
    bh = tl.program_id(1).to(tl.int64)
    offs_k = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    offs_c = tl.arange(0, CHUNKS)
    mask_k = offs_k < n_keys
    total = tl.zeros([KEYS], tl.int32)
    for start in range(0, n_chunks, CHUNKS):
        at = counter_ptr + (bh * n_chunks + start + offs_c)[:, None] * n_keys + offs_k[None, :]
        mask = (start + offs_c < n_chunks)[:, None] & mask_k[None, :]
        counted = tl.load(at, mask=mask, other=0)  # [CHUNKS, KEYS]
        tl.store(at, total[None, :] + tl.cumsum(counted, 0) - counted, mask=mask)
        total += tl.sum(counted, 0)
    tl.store(offset_ptr + bh * (n_keys + 1) + 1 + offs_k, total, mask=mask_k)


@triton.jit(do_not_specialize=["n_keys"])
def _transpose_scan_keys_kernel(offset_ptr, order_ptr, n_keys, KEYS: tl.constexpr, HOT_FACTOR: tl.constexpr):
    """Sums of the keys to offsets in place, and the order in which the backward starts them: hot ones first."""
    bh = tl.program_id(0).to(tl.int64)
    offsets = offset_ptr + bh * (n_keys + 1)
    order = order_ptr + bh * n_keys
    offs = tl.arange(0, KEYS)
    total = 0
    for start in range(0, n_keys, KEYS):
        total += tl.sum(tl.load(offsets + 1 + start + offs, mask=start + offs < n_keys, other=0))
    limit = HOT_FACTOR * total
    n_hot = 0
    for start in range(0, n_keys, KEYS):
        length = tl.load(offsets + 1 + start + offs, mask=start + offs < n_keys, other=0)
        n_hot += tl.sum((length.to(tl.int64) * n_keys > limit).to(tl.int32))
    before = 0
    hot_before = 0
    for start in range(0, n_keys, KEYS):
        mask = start + offs < n_keys
        length = tl.load(offsets + 1 + start + offs, mask=mask, other=0)
        is_hot = (length.to(tl.int64) * n_keys > limit).to(tl.int32)
        hot_up_to = hot_before + tl.cumsum(is_hot, 0)
        slot = tl.where(is_hot > 0, hot_up_to - 1, n_hot + start + offs - hot_up_to)
        tl.store(order + slot, start + offs, mask=mask)
        tl.store(offsets + 1 + start + offs, before + tl.cumsum(length, 0), mask=mask)
        before += tl.sum(length)
        hot_before += tl.sum(is_hot)
    tl.store(offsets, 0)


def launch_transpose(
    blocks: torch.Tensor, counts: torch.Tensor, num_key_blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Offsets, entries and order: what `prepare.transpose_lists` and `prepare.hot_first_order` give, on one stream."""
    batch, heads, n_rows, width = blocks.shape
    n_chunks = triton.cdiv(n_rows, ROWS)
    counters = blocks.new_zeros(batch, heads, n_chunks, num_key_blocks)
    offsets = blocks.new_empty(batch, heads, num_key_blocks + 1)
    # Entries beyond the last offset must still name a query block.
    entries = blocks.new_zeros(batch, heads, n_rows * width)
    order = blocks.new_empty(batch, heads, num_key_blocks)
    arguments = (
        blocks, counts, counters, offsets, entries, *broadcast_strides(blocks), blocks.stride(2),
        *broadcast_strides(counts), heads, n_rows, num_key_blocks, n_rows * width,
    )
    with torch.cuda.device_of(blocks):
        rows = _transpose_rows_kernel[(n_chunks, batch * heads)]
        rows(*arguments, ROWS=ROWS, COLS=256, FILL=False, num_warps=4, num_stages=1)
        _transpose_scan_rows_kernel[(triton.cdiv(num_key_blocks, 32), batch * heads)](
            counters, offsets, n_chunks, num_key_blocks, CHUNKS=32, KEYS=32, num_warps=4)
        _transpose_scan_keys_kernel[(batch * heads,)](
            offsets, order, num_key_blocks, KEYS=1024, HOT_FACTOR=HOT_FACTOR, num_warps=4)
        rows(*arguments, ROWS=ROWS, COLS=256, FILL=True, num_warps=4, num_stages=1)
    return offsets, entries, order
