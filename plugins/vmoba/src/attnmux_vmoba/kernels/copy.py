"""Rows on their way to the attention of tiles and back.

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
from attnmux_vmoba.kernels.relaunch import Launches, launch

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


@triton.jit
def _pairs_of(first_ptr, unit, n_units, unit_tokens, length, ROWS: tl.constexpr):
    """Tokens of a program's rows of a unit, the first of their pairs, and the number of them; none beyond the sequence."""
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = unit % n_units * unit_tokens + local
    is_token = (local < unit_tokens) & (token < length)
    at = first_ptr + unit * (unit_tokens + 1) + local
    first = tl.load(at, mask=is_token, other=0)
    return token, first, tl.load(at + 1, mask=is_token, other=0) - first


@triton.jit(do_not_specialize=["first_unit", "n_heads", "n_token_blocks", "unit_tokens", "capacity", "n_rows", "n_stats",
                               "n_chunks", "length"])
def _vmoba_gather_kernel(
    q_ptr, do_ptr, out_ptr, lse_ptr, first_ptr, row_ptr, raster_ptr, size_ptr, start_ptr,
    q_dst_ptr, do_dst_ptr, lse2_ptr, delta_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_do_b, stride_do_s, stride_do_h, stride_out_b, stride_out_s, stride_out_h,
    first_unit, n_heads, n_token_blocks, unit_tokens, capacity, n_rows, n_stats, n_chunks, length,
    FOR_BACKWARD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    bh = (first_unit + tl.program_id(1)).to(tl.int64)
    local = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    q_dst_ptr += local * n_rows * D
    if FOR_BACKWARD:
        do_dst_ptr += local * n_rows * D
        lse2_ptr += local * n_stats
        delta_ptr += local * n_stats
    if block < n_token_blocks:
        token, first, n = _pairs_of(first_ptr, bh, 1, unit_tokens, length, ROWS)
        is_token = n > 0
        raster = tl.load(raster_ptr + token, mask=is_token, other=0)
        batch = bh // n_heads
        head = bh % n_heads
        q = load_rows(q_ptr + batch * stride_q_b + head * stride_q_h, raster, is_token, stride_q_s, D, D_PAD)
        if FOR_BACKWARD:
            do = load_rows(do_ptr + batch * stride_do_b + head * stride_do_h, raster, is_token, stride_do_s, D, D_PAD)
            out = load_rows(out_ptr + batch * stride_out_b + head * stride_out_h, raster, is_token, stride_out_s, D, D_PAD)
            delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
            lse2 = tl.load(lse_ptr + bh * length + token, mask=is_token, other=0.0) * 1.4426950408889634
        row_ptr += bh * capacity
        for slot in range(tl.max(n, 0)):
            is_pair = slot < n
            rows = tl.load(row_ptr + first + slot, mask=is_pair, other=0)
            store_rows(q_dst_ptr, q, rows, is_pair, D, D, D_PAD)
            if FOR_BACKWARD:
                store_rows(do_dst_ptr, do, rows, is_pair, D, D, D_PAD)
                tl.store(lse2_ptr + rows, lse2, mask=is_pair)
                tl.store(delta_ptr + rows, delta, mask=is_pair)
    elif FOR_BACKWARD:
        # Rows between the last pair of a chunk and its last tile's end: they would be summed over, so they hold zeros.
        chunk = block - n_token_blocks
        end = tl.load(start_ptr + bh * n_chunks + chunk) + tl.load(size_ptr + bh * n_chunks + chunk)
        last = (end + TILE - 1) // TILE * TILE
        zeros = tl.zeros([ROWS, D_PAD], tl.float32)
        for start in range(end, last, ROWS):
            rows = start + tl.arange(0, ROWS)
            store_rows(q_dst_ptr, zeros, rows, rows < last, D, D, D_PAD)
            store_rows(do_dst_ptr, zeros, rows, rows < last, D, D, D_PAD)
            tl.store(lse2_ptr + rows, tl.zeros([ROWS], tl.float32), mask=rows < last)
            tl.store(delta_ptr + rows, tl.zeros([ROWS], tl.float32), mask=rows < last)


@triton.jit(do_not_specialize=["first_unit", "n_units", "n_heads", "unit_tokens", "capacity", "n_rows", "length"])
def _vmoba_merge_kernel(
    part_ptr, part_lse_ptr, first_ptr, row_ptr, raster_ptr, out_ptr, lse_ptr, stride_out_b, stride_out_s, stride_out_h,
    first_unit, n_units, n_heads, unit_tokens, capacity, n_rows, length,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    unit = (first_unit + tl.program_id(1)).to(tl.int64)
    bh = unit // n_units
    token, first, n = _pairs_of(first_ptr, unit, n_units, unit_tokens, length, ROWS)
    part_ptr += tl.program_id(1).to(tl.int64) * n_rows * D
    part_lse_ptr += tl.program_id(1).to(tl.int64) * n_rows
    row_ptr += unit * capacity
    most = tl.max(n, 0)
    if most == 0:
        return
    peak = tl.full([ROWS], -1e30, tl.float32)
    for slot in range(most):
        is_pair = slot < n
        rows = tl.load(row_ptr + first + slot, mask=is_pair, other=0)
        peak = tl.maximum(peak, tl.load(part_lse_ptr + rows, mask=is_pair, other=float("-inf")))
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for slot in range(most):
        is_pair = slot < n
        rows = tl.load(row_ptr + first + slot, mask=is_pair, other=0)
        share = tl.exp(tl.load(part_lse_ptr + rows, mask=is_pair, other=float("-inf")) - peak)
        part = load_rows(part_ptr, rows, is_pair, D, D, D_PAD)
        acc += share[:, None] * part.to(tl.float32)
        weight += share
    # a token without pairs is one of a walked range, or none
    is_done = n > 0
    raster = tl.load(raster_ptr + token, mask=is_done, other=0)
    out_ptr += bh // n_heads * stride_out_b + bh % n_heads * stride_out_h
    store_rows(out_ptr, acc / weight[:, None], raster, is_done, stride_out_s, D, D_PAD)
    tl.store(lse_ptr + bh * length + token, peak + tl.log(weight), mask=is_done)


@triton.jit(do_not_specialize=["first_unit", "n_units", "n_heads", "unit_tokens", "capacity", "n_rows", "length"])
def _vmoba_sum_kernel(
    part_ptr, first_ptr, row_ptr, raster_ptr, dst_ptr, stride_dst_b, stride_dst_s, stride_dst_h,
    first_unit, n_units, n_heads, unit_tokens, capacity, n_rows, length,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    unit = (first_unit + tl.program_id(1)).to(tl.int64)
    bh = unit // n_units
    token, first, n = _pairs_of(first_ptr, unit, n_units, unit_tokens, length, ROWS)
    part_ptr += tl.program_id(1).to(tl.int64) * n_rows * D
    row_ptr += unit * capacity
    most = tl.max(n, 0)
    if most == 0:
        return
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for slot in range(most):
        rows = tl.load(row_ptr + first + slot, mask=slot < n, other=0)
        acc += load_rows(part_ptr, rows, slot < n, D, D, D_PAD).to(tl.float32)
    raster = tl.load(raster_ptr + token, mask=n > 0, other=0)
    dst_ptr += bh // n_heads * stride_dst_b + bh % n_heads * stride_dst_h
    store_rows(dst_ptr, acc, raster, n > 0, stride_dst_s, D, D_PAD)


def to_chunks(launches: Launches, k, v, k_dst, v_dst, chunks, padded_tokens: int) -> None:
    """One sample's keys and values `[S, h, D]`, raster order -> `[rows, h, D]`: chunks of `padded_tokens`, zeros at their ends."""
    _launch_layout(launches, k, v, k_dst, v_dst, chunks, padded_tokens, k_dst.shape[0], to_chunks=True)


def from_chunks(launches: Launches, k, v, k_dst, v_dst, chunks, padded_tokens: int) -> None:
    """The inverse of `to_chunks`, into `[S, h, D]`; padding is dropped."""
    _launch_layout(launches, k, v, k_dst, v_dst, chunks, padded_tokens, k.shape[0], to_chunks=False)


def _launch_layout(launches, k, v, k_dst, v_dst, chunks, padded_tokens, n_rows, *, to_chunks):
    heads, D = k.shape[1:]
    launch(
        launches, _vmoba_layout_kernel, (triton.cdiv(n_rows, ROWS), heads, 2),
        k, v, k_dst, v_dst, *k.stride()[:2], *v.stride()[:2], *k_dst.stride()[:2], *v_dst.stride()[:2],
        padded_tokens, n_rows, *geometry_arguments(chunks),
        TO_CHUNKS=to_chunks, ROWS=ROWS, D=D, D_PAD=triton.next_power_of_2(D), num_warps=4)


def gather_queries(launches: Launches, q, pairs, first_unit, dst) -> None:
    """Queries of the units from `first_unit` on to the rows of their pairs, in dst `[units, n_rows, D]`; its other rows are left.

    q is `[B, S, H, D]`, and a unit a head.
    """
    _launch_gather(launches, q, None, None, None, pairs, first_unit, dst, None, None)


def gather_for_backward(launches: Launches, q, dout, out, lse, pairs, first_unit, q_dst, do_dst, stats) -> None:
    """As `gather_queries`, for q and dout, with zeros between chunks; and the statistics of the rows.

    lse: float32 [B, H, S], tokens in chunk order. stats: float32 [2, units, n_stats], the base-2 LSE and delta of every row;
    n_stats is n_rows up to a multiple of 256.
    """
    _launch_gather(launches, q, dout, out, lse, pairs, first_unit, q_dst, do_dst, stats)


def _launch_gather(launches, q, dout, out, lse, pairs, first_unit, q_dst, do_dst, stats):
    S, heads, D = q.shape[1:]
    C = pairs.starts.shape[3]
    n_token_blocks = triton.cdiv(S, ROWS)
    for_backward = dout is not None
    if not for_backward:
        dout = out = q
        lse, do_dst, lse2, delta = pairs.starts, q_dst, q_dst[0], q_dst[0]
    else:
        lse2, delta = stats.unbind(0)
    launch(
        launches, _vmoba_gather_kernel, (n_token_blocks + (C if for_backward else 0), q_dst.shape[0], 1),
        q, dout, out, lse, pairs.firsts, pairs.rows, pairs.raster, pairs.sizes[0], pairs.starts, q_dst, do_dst, lse2, delta,
        *q.stride()[:3], *dout.stride()[:3], *out.stride()[:3],
        first_unit, heads, n_token_blocks, pairs.unit_tokens, pairs.rows.shape[3], q_dst.shape[1], lse2.shape[1], C, S,
        FOR_BACKWARD=for_backward, ROWS=ROWS, TILE=128, D=D, D_PAD=triton.next_power_of_2(D), num_warps=4)


def merge_parts(launches: Launches, parts, part_lse, pairs, first_unit, out, lse) -> None:
    """Merge what the units from `first_unit` on hold in parts `[units, n_rows, D]` and their LSE, by the LSE.

    Fills their rows of out `[B, S, H, D]`, raster order, and of lse `[B, H, S]`, chunk order. Walked ranges are left alone.
    """
    _launch_over_pairs(launches, _vmoba_merge_kernel, (parts, part_lse), pairs, first_unit, (out, lse))


def sum_parts(launches: Launches, parts, pairs, first_unit, dst) -> None:
    """Fill the rows of dst `[B, S, H, D]`, raster order, with the sums of parts `[units, n_rows, D]`; see `merge_parts`."""
    _launch_over_pairs(launches, _vmoba_sum_kernel, (parts,), pairs, first_unit, (dst,))


def _launch_over_pairs(launches, kernel, parts, pairs, first_unit, targets):
    n_units, n_rows, D = parts[0].shape
    launch(
        launches, kernel, (triton.cdiv(pairs.unit_tokens, ROWS), n_units, 1),
        *parts, pairs.firsts, pairs.rows, pairs.raster, *targets, *targets[0].stride()[:3],
        first_unit, pairs.per_head, targets[0].shape[2], pairs.unit_tokens, pairs.rows.shape[3], n_rows, targets[0].shape[1],
        ROWS=ROWS, D=D, D_PAD=triton.next_power_of_2(D), num_warps=4)
