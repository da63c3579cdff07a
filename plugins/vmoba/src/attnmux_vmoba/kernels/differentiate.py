"""Gradients of the attention of `attend`, on the same tables. Nothing is gathered but into registers, nothing added with atomics.

stats   base-2 log-sum-exp and delta = rowsum(dO * O) of every query, in raster order
dkdv    a program owns a block of a chunk's keys and goes over the queries that chose the chunk, the chunks of most queries first
dq      parts and walk, as in `attend`; the parts of a query are summed by `copy.sum_parts`
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
import triton
import triton.language as tl

from attnmux_vmoba.kernels.attend import (
    FULL_TILE,
    LOG2_E,
    chunk_constants,
    is_member,
    key_rows,
    keys_of_step,
    load_keys,
    rows_of_tile,
    stages_over_keys,
    walk_arguments,
)
from attnmux_vmoba.kernels.configs import AttendConfig
from attnmux_vmoba.kernels.geometry import load_rows, store_rows
from attnmux_vmoba.kernels.relaunch import Launches, launch
from attnmux_vmoba.kernels.sort import rank_chunks

# Key blocks of this many chunks of every head, those of most queries, start before all others: one that every query chose
# takes many times the mean, and started last it would run alone at the end.
EARLY_CHUNKS = 2


@triton.jit(do_not_specialize=["n_heads", "length"])
def _vmoba_stats_kernel(
    out_ptr, do_ptr, lse_ptr, raster_ptr, lse2_ptr, delta_ptr, stride_out_b, stride_out_s, stride_out_h,
    stride_do_b, stride_do_s, stride_do_h, n_heads, length, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // n_heads
    head = bh % n_heads
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < length
    raster = tl.load(raster_ptr + token, mask=is_token, other=0)
    out = load_rows(out_ptr + batch * stride_out_b + head * stride_out_h, raster, is_token, stride_out_s, D, D_PAD)
    do = load_rows(do_ptr + batch * stride_do_b + head * stride_do_h, raster, is_token, stride_do_s, D, D_PAD)
    lse = tl.load(lse_ptr + bh * length + token, mask=is_token, other=0.0)
    tl.store(lse2_ptr + bh * length + raster, lse * 1.4426950408889634, mask=is_token)
    tl.store(delta_ptr + bh * length + raster, tl.sum(out.to(tl.float32) * do.to(tl.float32), 1), mask=is_token)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, row_ptr, word_ptr, stride_q_s, stride_do_s, n, n_masked, bit,
    scale_log2, MAY_OVERFLOW: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the gradients of n queries to dk and dv [BLOCK, D_PAD]; the first n_masked count if their bit is set."""
    for start in tl.range(0, n, TILE, num_stages=STAGES):
        # Rows beyond the last repeat it with no weight: masks on every load would cost more.
        offs = start + tl.arange(0, TILE)
        keep = offs < n
        at = tl.minimum(offs, n - 1)
        rows = tl.load(row_ptr + at)
        if MAY_OVERFLOW:
            word = tl.load(word_ptr + at, mask=at < n_masked, other=-1)
            keep = keep & (((word >> bit) & 1) != 0)
        q = load_keys(q_ptr, rows, keep, stride_q_s, False, D, D_PAD, WIDE)
        do = load_keys(do_ptr, rows, keep, stride_do_s, False, D, D_PAD, WIDE)
        # a weight of exp2(s - inf) = 0
        lse2 = tl.where(keep, tl.load(lse2_ptr + rows), float("inf"))
        delta = tl.load(delta_ptr + rows)
        s = tl.dot(k, q.T)  # [BLOCK, TILE]
        p = tl.exp2(s * scale_log2 - lse2[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv)
        dp = tl.dot(v, do.T)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["n_units", "n_pairs", "n_heads_k", "n_rows", "n_chunks", "n_words", "n_blocks", "unit_tokens",
                               "chunk_tokens", "length"])
def _vmoba_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse2_ptr, delta_ptr,
    order_ptr, start_ptr, size_ptr, placed_ptr, raster_ptr, word_ptr, rank_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_do_b, stride_do_s, stride_do_h, stride_dk_b, stride_dk_s, stride_dk_h,
    n_units, n_pairs, n_heads_k, n_rows, n_chunks, n_words, n_blocks, unit_tokens, chunk_tokens, length, scale_log2, scale,
    GROUP: tl.constexpr, MAY_OVERFLOW: tl.constexpr, ADDS: tl.constexpr, IS_RUN: tl.constexpr, MASK_K: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):
    # The first slots of every head come first, then the others head by head. A chunk has n_blocks slots.
    pid = tl.program_id(0)
    early = tl.minimum(EARLY, n_chunks) * n_blocks
    late = tl.maximum(n_chunks * n_blocks - early, 1)
    if pid < n_pairs * early:
        pair = pid % n_pairs
        slot = pid // n_pairs
    else:
        pair = (pid - n_pairs * early) // late
        slot = early + (pid - n_pairs * early) % late
    batch = (pair // n_heads_k).to(tl.int64)
    head_k = (pair % n_heads_k).to(tl.int64)
    bh = (batch * n_heads_k + head_k) * GROUP
    chunk = tl.load(rank_ptr + bh * n_chunks + slot // n_blocks)
    n_keys = tl.minimum(chunk_tokens, length - chunk * chunk_tokens)
    if slot % n_blocks * BLOCK >= n_keys:
        return
    if ADDS:
        most = 0
        for i in range(GROUP * n_units):
            most = tl.maximum(most, length - i % n_units * unit_tokens - tl.load(placed_ptr + bh * n_units + i))
        if most <= 0:
            return
    keys, is_key = key_rows(raster_ptr, chunk * chunk_tokens, slot % n_blocks * BLOCK, n_keys, IS_RUN, MASK_K, BLOCK)
    k = load_keys(k_ptr + batch * stride_k_b + head_k * stride_k_h, keys, is_key, stride_k_s, MASK_K, D, D_PAD, WIDE)
    v = load_keys(v_ptr + batch * stride_v_b + head_k * stride_v_h, keys, is_key, stride_v_s, MASK_K, D, D_PAD, WIDE)
    dk = tl.zeros([BLOCK, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK, D_PAD], tl.float32)
    # with MAY_OVERFLOW every unit has two turns: its ordered queries, and those of ranges without room, which ADDS has alone
    TURNS: tl.constexpr = 2 if MAY_OVERFLOW and not ADDS else 1
    for turn in range(GROUP * n_units * TURNS):
        i = turn // TURNS
        head = head_k * GROUP + i // n_units
        unit = bh * n_units + i
        n = tl.load(size_ptr + unit * n_chunks + chunk)
        rows = order_ptr + unit * n_rows + tl.load(start_ptr + unit * n_chunks + chunk)
        words = word_ptr
        n_masked = 0
        if MAY_OVERFLOW:
            placed = tl.load(placed_ptr + unit)
            first = i % n_units * unit_tokens + placed
            words = word_ptr + ((bh + i // n_units) * n_words + chunk // 32) * length + first
            if turn % TURNS == TURNS - 1:
                rows = raster_ptr + first
                n = tl.minimum(unit_tokens - placed, length - first)
                n_masked = n
        stats = (batch * n_heads_k * GROUP + head) * length
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, q_ptr + batch * stride_q_b + head * stride_q_h, do_ptr + batch * stride_do_b + head * stride_do_h,
            lse2_ptr + stats, delta_ptr + stats, rows, words, stride_q_s, stride_do_s, n, n_masked, chunk % 32,
            scale_log2, MAY_OVERFLOW, TILE, D, D_PAD, WIDE, STAGES)
    at = batch * stride_dk_b + head_k * stride_dk_h
    dk *= scale
    if ADDS:
        dk += load_rows(dk_ptr + at, keys, is_key, stride_dk_s, D, D_PAD)
        dv += load_rows(dv_ptr + at, keys, is_key, stride_dk_s, D, D_PAD)
    store_rows(dk_ptr + at, dk, keys, is_key, stride_dk_s, D, D_PAD)
    store_rows(dv_ptr + at, dv, keys, is_key, stride_dk_s, D, D_PAD)


@triton.jit
def _add_keys(
    dq, q, do, lse2, delta, k_ptr, v_ptr, keys, is_key, stride_k_s, stride_v_s, scale_log2,
    MASK_K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr,
):
    """Add what keys give to dq [TILE, D_PAD]."""
    k = load_keys(k_ptr, keys, is_key, stride_k_s, MASK_K, D, D_PAD, WIDE)
    v = load_keys(v_ptr, keys, is_key, stride_v_s, MASK_K, D, D_PAD, WIDE)
    s = tl.dot(q, k.T)  # [TILE, BLOCK]
    dp = tl.dot(do, v.T)
    ds = tl.exp2(s * scale_log2 - lse2[:, None]) * (dp - delta[:, None])
    # Replaced, not multiplied: the weight of a key that was not attended to may be infinite.
    if MASK_K:
        ds = tl.where(is_key[None, :], ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["first_unit", "n_units", "n_heads", "n_rows", "chunk_tokens", "length"])
def _vmoba_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, part_ptr, lse2_ptr, delta_ptr, order_ptr, tile_ptr, used_ptr, raster_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_do_b, stride_do_s, stride_do_h,
    first_unit, n_units, n_heads, n_rows, chunk_tokens, length, scale_log2, scale,
    GROUP: tl.constexpr, IS_RUN: tl.constexpr, MASK_K: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, FULL_TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):
    unit = (first_unit + tl.program_id(1)).to(tl.int64)
    bh = unit // n_units
    batch = bh // n_heads
    head = bh % n_heads
    q_ptr += batch * stride_q_b + head * stride_q_h
    do_ptr += batch * stride_do_b + head * stride_do_h
    k_ptr += batch * stride_k_b + head // GROUP * stride_k_h
    v_ptr += batch * stride_v_b + head // GROUP * stride_v_h
    part_ptr += tl.program_id(1).to(tl.int64) * n_rows * D
    for tile in range(tl.program_id(0), tl.load(used_ptr + unit) * (FULL_TILE // TILE), tl.num_programs(0)):
        chunk, n, is_row, raster = rows_of_tile(order_ptr, tile_ptr, unit * (n_rows // TILE) + tile, TILE, FULL_TILE)
        if n > 0:
            q = load_rows(q_ptr, raster, is_row, stride_q_s, D, D_PAD)
            do = load_rows(do_ptr, raster, is_row, stride_do_s, D, D_PAD)
            lse2 = tl.load(lse2_ptr + bh * length + raster, mask=is_row, other=float("inf"))
            delta = tl.load(delta_ptr + bh * length + raster, mask=is_row, other=0.0)
            dq = tl.zeros([TILE, D_PAD], tl.float32)
            first = chunk * chunk_tokens
            n_keys = tl.minimum(chunk_tokens, length - first)
            for start in tl.range(0, n_keys, BLOCK, num_stages=STAGES):
                keys, is_key = key_rows(raster_ptr, first, start, n_keys, IS_RUN, MASK_K, BLOCK)
                dq = _add_keys(
                    dq, q, do, lse2, delta, k_ptr, v_ptr, keys, is_key, stride_k_s, stride_v_s, scale_log2,
                    MASK_K, D, D_PAD, WIDE)
            store_rows(part_ptr, dq * scale, tile * TILE + tl.arange(0, TILE), is_row, D, D, D_PAD)


@triton.jit(do_not_specialize=["n_heads", "n_ranges", "n_chunks", "n_words", "chunk_blocks", "chunk_tokens", "length"])
def _vmoba_bwd_dq_walk_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, lse2_ptr, delta_ptr, walk_ptr, walked_ptr, raster_ptr, word_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_do_b, stride_do_s, stride_do_h, stride_dq_b, stride_dq_s, stride_dq_h,
    n_heads, n_ranges, n_chunks, n_words, chunk_blocks, chunk_tokens, length, scale_log2, scale,
    GROUP: tl.constexpr, IS_RUN: tl.constexpr, MASK_K: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, FULL_TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):
    bh = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = bh * n_ranges + tl.program_id(0) * TILE // FULL_TILE
    n = tl.load(walk_ptr + at)
    if n == 0:
        return
    walked_ptr += at * n_chunks
    word_ptr += bh * n_words * length
    batch = bh // n_heads
    head = bh % n_heads
    is_row = token < length
    raster = tl.load(raster_ptr + token, mask=is_row, other=0)
    q = load_rows(q_ptr + batch * stride_q_b + head * stride_q_h, raster, is_row, stride_q_s, D, D_PAD)
    do = load_rows(do_ptr + batch * stride_do_b + head * stride_do_h, raster, is_row, stride_do_s, D, D_PAD)
    lse2 = tl.load(lse2_ptr + bh * length + raster, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + bh * length + raster, mask=is_row, other=0.0)
    k_ptr += batch * stride_k_b + head // GROUP * stride_k_h
    v_ptr += batch * stride_v_b + head // GROUP * stride_v_h
    dq = tl.zeros([TILE, D_PAD], tl.float32)
    for i in tl.range(0, n * chunk_blocks, num_stages=STAGES):
        chunk, keys, is_key = keys_of_step(
            walked_ptr, raster_ptr, i, chunk_blocks, chunk_tokens, length, IS_RUN, MASK_K, BLOCK)
        # a weight of exp2(s - inf) = 0 for the rows that did not choose the chunk
        lse2_kept = tl.where(is_member(word_ptr, chunk, token, is_row, length), lse2, float("inf"))
        dq = _add_keys(
            dq, q, do, lse2_kept, delta, k_ptr, v_ptr, keys, is_key, stride_k_s, stride_v_s, scale_log2, MASK_K, D, D_PAD, WIDE)
    store_rows(dq_ptr + batch * stride_dq_b + head * stride_dq_h, dq * scale, raster, is_row, stride_dq_s, D, D_PAD)


def launch_stats(out, dout, lse, pairs):
    """The base-2 LSE and delta of every query, float32 [2, B, H, S] in raster order."""
    batch, length, heads, D = out.shape
    stats = torch.empty(2, batch, heads, length, device=out.device, dtype=torch.float32)
    rows = 64
    _vmoba_stats_kernel[(triton.cdiv(length, rows), batch * heads)](
        out, dout, lse, pairs.raster, *stats.unbind(0), *out.stride()[:3], *dout.stride()[:3], heads, length,
        ROWS=rows, D=D, D_PAD=triton.next_power_of_2(D), num_warps=4)
    return stats


def launch_dkdv(
    q, k, v, dout, stats, words, pairs, dk, dv, chunks, *, softmax_scale, config: AttendConfig, may_overflow: bool,
    adds: bool = False,
) -> None:
    """Fill dk and dv `[B, S, H_kv, D]`, of equal strides, or add to them what ranges without room give.

    Without `adds` the pairs were sorted with orders_walked.
    """
    batch, _, heads, _ = q.shape
    heads_k, C = k.shape[2], chunks.num_chunks
    blocks = triton.cdiv(chunks.chunk_tokens, config.keys)
    _vmoba_bwd_dkdv_kernel[(batch * heads_k * C * blocks,)](
        q, k, v, dout, dk, dv, *stats.unbind(0),
        pairs.order, pairs.starts, pairs.sizes[1], pairs.placed, pairs.raster, words, rank_chunks(pairs),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3],
        pairs.per_head, batch * heads_k, heads_k, pairs.order.shape[3], C, words.shape[2], blocks, pairs.unit_tokens,
        chunks.chunk_tokens, chunks.length, softmax_scale * LOG2_E, softmax_scale,
        GROUP=heads // heads_k, MAY_OVERFLOW=may_overflow, ADDS=adds, TILE=config.rows,
        **chunk_constants(chunks, config.keys, q, k, v, dout), STAGES=config.stages + 1, EARLY=EARLY_CHUNKS, num_warps=config.warps)


def launch_dq_parts(
    launches: Launches, q, k, v, dout, stats, pairs, tiles, parts, first_unit, chunks, *, softmax_scale, config: AttendConfig
) -> None:
    """Fill parts `[units of the slice, n_rows, D]` from the units from `first_unit` on."""
    heads = q.shape[2]
    n_units, n_rows = parts.shape[:2]
    launch(
        launches, _vmoba_bwd_dq_kernel, (triton.cdiv(n_rows // config.rows, config.tiles), n_units, 1),
        q, k, v, dout, parts, *stats.unbind(0), pairs.order, *tiles, pairs.raster,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        first_unit, pairs.per_head, heads, n_rows, chunks.chunk_tokens, chunks.length, softmax_scale * LOG2_E, softmax_scale,
        GROUP=heads // k.shape[2], **chunk_constants(chunks, config.keys, q, k, v, dout), TILE=config.rows,
        FULL_TILE=FULL_TILE, STAGES=stages_over_keys(chunks, config), num_warps=config.warps)


def launch_dq_walk(q, k, v, dout, stats, words, pairs, dq, chunks, *, softmax_scale, config: AttendConfig) -> None:
    """Fill the rows of dq `[B, S, H, D]` of the walked ranges."""
    batch, length, heads = q.shape[:3]
    _vmoba_bwd_dq_walk_kernel[(triton.cdiv(length, config.rows), batch * heads)](
        q, k, v, dout, dq, *stats.unbind(0), pairs.walks, pairs.walked, pairs.raster, words,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
        heads, *walk_arguments(pairs, words, chunks, config.keys), softmax_scale * LOG2_E, softmax_scale,
        GROUP=heads // k.shape[2], **chunk_constants(chunks, config.keys, q, k, v, dout), TILE=config.rows,
        FULL_TILE=FULL_TILE, STAGES=stages_over_keys(chunks, config), num_warps=config.warps)
