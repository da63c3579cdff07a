"""Rows on their way to the block-sparse operator and back.

layout   raster keys or queries in chunk order, every chunk padded to whole blocks with zeros; and back
gather   queries, and for the backward pass their gradients and statistics, to the rows of their pairs
merge    the partial outputs of a query, weighted by their log-sum-exps, in float32, to raster order
sum      the partial gradients of a query, in float32 and in a fixed order, to raster order
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import triton
import triton.language as tl

from attnmux_vmoba.kernels.geometry import GEOMETRY, geometry_arguments, load_rows, raster_of, store_rows

ROWS = 64


@triton.jit(do_not_specialize=["padded_tokens", "n_rows", *GEOMETRY])
def _vmoba_layout_kernel(
    k_ptr, v_ptr, k_dst_ptr, v_dst_ptr, stride_k_s, stride_k_h, stride_v_s, stride_v_h,
    stride_k_dst_s, stride_k_dst_h, stride_v_dst_s, stride_v_dst_h, padded_tokens, n_rows,
    n_h, n_w, box_t, box_h, box_w, grid_h, grid_w, chunk_tokens, length,
    TO_CHUNKS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = row // padded_tokens
    place = row % padded_tokens
    is_token = (place < chunk_tokens) & (chunk * chunk_tokens + place < length) & (row < n_rows)
    raster = raster_of(chunk, place, n_h, n_w, box_t, box_h, box_w, grid_h, grid_w)
    if tl.program_id(2) == 0:
        src_ptr, dst_ptr, stride_src_s, stride_dst_s = k_ptr, k_dst_ptr, stride_k_s, stride_k_dst_s
        src_ptr += head * stride_k_h
        dst_ptr += head * stride_k_dst_h
    else:
        src_ptr, dst_ptr, stride_src_s, stride_dst_s = v_ptr, v_dst_ptr, stride_v_s, stride_v_dst_s
        src_ptr += head * stride_v_h
        dst_ptr += head * stride_v_dst_h
    if TO_CHUNKS:
        x = load_rows(src_ptr, raster, is_token, stride_src_s, D, D_PAD)
        store_rows(dst_ptr, x, row, row < n_rows, stride_dst_s, D, D_PAD)
    else:
        x = load_rows(src_ptr, row, is_token, stride_src_s, D, D_PAD)
        store_rows(dst_ptr, x, raster, is_token, stride_dst_s, D, D_PAD)


@triton.jit(do_not_specialize=["n_token_blocks", "n_slots", "n_rows", "n_stats", "n_chunks", *GEOMETRY])
def _vmoba_gather_kernel(
    q_ptr, do_ptr, out_ptr, lse_ptr, row_ptr, size_ptr, q_dst_ptr, do_dst_ptr, lse2_ptr, delta_ptr,
    stride_q_s, stride_q_h, stride_do_s, stride_do_h, stride_out_s, stride_out_h,
    n_token_blocks, n_slots, n_rows, n_stats, n_chunks,
    n_h, n_w, box_t, box_h, box_w, grid_h, grid_w, chunk_tokens, length,
    FOR_BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    q_dst_ptr += head * n_rows * D
    if FOR_BACKWARD:
        do_dst_ptr += head * n_rows * D
    if block < n_token_blocks:
        token = block * ROWS + tl.arange(0, ROWS)
        is_token = token < length
        raster = raster_of(token // chunk_tokens, token % chunk_tokens, n_h, n_w, box_t, box_h, box_w, grid_h, grid_w)
        q = load_rows(q_ptr + head * stride_q_h, raster, is_token, stride_q_s, D, D_PAD)
        if FOR_BACKWARD:
            do = load_rows(do_ptr + head * stride_do_h, raster, is_token, stride_do_s, D, D_PAD)
            out = load_rows(out_ptr + head * stride_out_h, raster, is_token, stride_out_s, D, D_PAD)
            delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
            lse2 = tl.load(lse_ptr + head * length + token, mask=is_token, other=0.0) * 1.4426950408889634
        for slot in range(n_slots):
            rows = tl.load(row_ptr + (head * n_slots + slot) * length + token, mask=is_token, other=0)
            store_rows(q_dst_ptr, q, rows, is_token, D, D, D_PAD)
            if FOR_BACKWARD:
                store_rows(do_dst_ptr, do, rows, is_token, D, D, D_PAD)
                tl.store(lse2_ptr + head * n_stats + rows, lse2, mask=is_token)
                tl.store(delta_ptr + head * n_stats + rows, delta, mask=is_token)
    elif FOR_BACKWARD:
        # Rows between the last pair of a chunk and its last tile's end: they would be summed over, so they hold zeros.
        chunk = block - n_token_blocks
        cols = tl.arange(0, COLS)
        sizes = tl.load(size_ptr + head * n_chunks + cols, mask=cols < n_chunks, other=0)
        tiles = (sizes + TILE - 1) // TILE
        first = tl.sum(tl.where(cols < chunk, tiles, 0), 0) * TILE
        size = tl.sum(tl.where(cols == chunk, sizes, 0), 0)
        last = first + tl.sum(tl.where(cols == chunk, tiles, 0), 0) * TILE
        zeros = tl.zeros([ROWS, D_PAD], tl.float32)
        for start in range(first + size, last, ROWS):
            rows = start + tl.arange(0, ROWS)
            store_rows(q_dst_ptr, zeros, rows, rows < last, D, D, D_PAD)
            store_rows(do_dst_ptr, zeros, rows, rows < last, D, D, D_PAD)
            tl.store(lse2_ptr + head * n_stats + rows, tl.zeros([ROWS], tl.float32), mask=rows < last)
            tl.store(delta_ptr + head * n_stats + rows, tl.zeros([ROWS], tl.float32), mask=rows < last)


@triton.jit(do_not_specialize=["n_slots", "n_rows", *GEOMETRY])
def _vmoba_merge_kernel(
    part_ptr, part_lse_ptr, row_ptr, out_ptr, lse_ptr, stride_out_s, stride_out_h, n_slots, n_rows,
    n_h, n_w, box_t, box_h, box_w, grid_h, grid_w, chunk_tokens, length,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < length
    part_ptr += head * n_rows * D
    part_lse_ptr += head * n_rows
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for slot in range(n_slots):
        rows = tl.load(row_ptr + (head * n_slots + slot) * length + token, mask=is_token, other=0)
        peak = tl.maximum(peak, tl.load(part_lse_ptr + rows, mask=is_token, other=0.0))
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for slot in range(n_slots):
        rows = tl.load(row_ptr + (head * n_slots + slot) * length + token, mask=is_token, other=0)
        share = tl.exp(tl.load(part_lse_ptr + rows, mask=is_token, other=0.0) - peak)
        part = load_rows(part_ptr, rows, is_token, D, D, D_PAD)
        acc += share[:, None] * part.to(tl.float32)
        weight += share
    raster = raster_of(token // chunk_tokens, token % chunk_tokens, n_h, n_w, box_t, box_h, box_w, grid_h, grid_w)
    store_rows(out_ptr + head * stride_out_h, acc / weight[:, None], raster, is_token, stride_out_s, D, D_PAD)
    tl.store(lse_ptr + head * length + token, peak + tl.log(weight), mask=is_token)


@triton.jit(do_not_specialize=["n_slots", "n_rows", *GEOMETRY])
def _vmoba_sum_kernel(
    part_ptr, row_ptr, dst_ptr, stride_dst_s, stride_dst_h, n_slots, n_rows,
    n_h, n_w, box_t, box_h, box_w, grid_h, grid_w, chunk_tokens, length,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < length
    part_ptr += head * n_rows * D
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for slot in range(n_slots):
        rows = tl.load(row_ptr + (head * n_slots + slot) * length + token, mask=is_token, other=0)
        acc += load_rows(part_ptr, rows, is_token, D, D, D_PAD).to(tl.float32)
    raster = raster_of(token // chunk_tokens, token % chunk_tokens, n_h, n_w, box_t, box_h, box_w, grid_h, grid_w)
    store_rows(dst_ptr + head * stride_dst_h, acc, raster, is_token, stride_dst_s, D, D_PAD)


def to_chunks(k, v, k_dst, v_dst, chunks, padded_tokens: int) -> None:
    """One sample's keys and values `[S, h, D]`, raster order -> `[rows, h, D]`: chunks of `padded_tokens`, zeros at their ends."""
    _launch_layout(k, v, k_dst, v_dst, chunks, padded_tokens, k_dst.shape[0], to_chunks=True)


def from_chunks(k, v, k_dst, v_dst, chunks, padded_tokens: int) -> None:
    """The inverse of `to_chunks`, into `[S, h, D]`; padding is dropped."""
    _launch_layout(k, v, k_dst, v_dst, chunks, padded_tokens, k.shape[0], to_chunks=False)


def _launch_layout(k, v, k_dst, v_dst, chunks, padded_tokens, n_rows, *, to_chunks):
    heads, D = k.shape[1:]
    _vmoba_layout_kernel[(triton.cdiv(n_rows, ROWS), heads, 2)](
        k, v, k_dst, v_dst, *k.stride()[:2], *v.stride()[:2], *k_dst.stride()[:2], *v_dst.stride()[:2],
        padded_tokens, n_rows, *geometry_arguments(chunks),
        TO_CHUNKS=to_chunks, ROWS=ROWS, D=D, D_PAD=triton.next_power_of_2(D), num_warps=4)


def gather_queries(q, rows, sizes, dst, chunks) -> None:
    """One sample's queries `[S, h, D]` to the rows of their pairs, in dst `[h, n_rows, D]`; its other rows are left alone.

    rows: int32 [h, k, S] and sizes: int32 [h, C] of `SortedPairs`, of these heads.
    """
    _launch_gather(q, None, None, None, rows, sizes, dst, None, None, chunks)


def gather_for_backward(q, dout, out, lse, rows, sizes, q_dst, do_dst, stats, chunks) -> None:
    """As `gather_queries`, for q and dout, with zeros between chunks; and the statistics of the rows.

    lse: float32 [h, S], tokens in chunk order. stats: float32 [2, h, n_stats], the base-2 LSE and delta of every row; n_stats is
    n_rows up to a multiple of 256.
    """
    _launch_gather(q, dout, out, lse, rows, sizes, q_dst, do_dst, stats, chunks)


def _launch_gather(q, dout, out, lse, rows, sizes, q_dst, do_dst, stats, chunks):
    S, heads, D = q.shape
    C = sizes.shape[1]
    n_token_blocks = triton.cdiv(S, ROWS)
    for_backward = dout is not None
    if not for_backward:
        dout = out = q
        lse, do_dst, lse2, delta = sizes, q_dst, sizes, sizes
    else:
        lse2, delta = stats.unbind(0)
    _vmoba_gather_kernel[(n_token_blocks + (C if for_backward else 0), heads)](
        q, dout, out, lse, rows, sizes, q_dst, do_dst, lse2, delta,
        *q.stride()[:2], *dout.stride()[:2], *out.stride()[:2],
        n_token_blocks, rows.shape[1], q_dst.shape[1], lse2.shape[1], C, *geometry_arguments(chunks),
        FOR_BACKWARD=for_backward, ROWS=ROWS, COLS=max(16, triton.next_power_of_2(C)), TILE=128,
        D=D, D_PAD=triton.next_power_of_2(D), num_warps=4)


def merge_parts(parts, part_lse, rows, out, lse, chunks) -> None:
    """Fill out `[S, h, D]`, raster order, and lse `[h, S]`, chunk order, from parts `[h, n_rows, D]` and their LSE."""
    heads, n_rows, D = parts.shape
    S = out.shape[0]
    _vmoba_merge_kernel[(triton.cdiv(S, ROWS), heads)](
        parts, part_lse, rows, out, lse, *out.stride()[:2], rows.shape[1], n_rows, *geometry_arguments(chunks),
        ROWS=ROWS, D=D, D_PAD=triton.next_power_of_2(D), num_warps=4)


def sum_parts(parts, rows, dst, chunks) -> None:
    """Fill dst `[S, h, D]` in raster order with the sums of the parts `[h, n_rows, D]` of every query."""
    heads, n_rows, D = parts.shape
    S = dst.shape[0]
    _vmoba_sum_kernel[(triton.cdiv(S, ROWS), heads)](
        parts, rows, dst, *dst.stride()[:2], rows.shape[1], n_rows, *geometry_arguments(chunks),
        ROWS=ROWS, D=D, D_PAD=triton.next_power_of_2(D), num_warps=4)
