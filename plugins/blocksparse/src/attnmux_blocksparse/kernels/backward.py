"""Block-sparse attention backward in plain Triton: no atomics, so the same input gives the same bits.

stats: base-2 log-sum-exp and delta = rowsum(dO * O) - dLSE of every query row, padded to whole blocks
dkdv:  one program per key tile walks the query blocks that chose it (the transposed lists)
dq:    one program per query tile walks its own list
Seven products instead of the textbook's five, in exchange for nothing being accumulated in global memory.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import math

import torch
import triton
import triton.language as tl

from attnmux_blocksparse.kernels.arguments import (
    LOG2_E,
    RasterTiles,
    broadcast_strides,
    describe_rows,
    index_arguments,
    raster_arguments,
    raster_constants,
)
from attnmux_blocksparse.kernels.configs import BackwardConfig
from attnmux_blocksparse.kernels.forward import block_end, load_tile, store_tile

# Rows of statistics are padded to a multiple of the largest block, so that no kernel masks their loads.
STATS_ALIGNMENT = 256
# This many longest lists of every head start before all others: a key block that every query chose takes many times
# the mean, and started last it would run alone at the end.
EARLY_BLOCKS = 8


@triton.jit
def tokens_of_rows(row, grid_h, grid_w, BLOCK: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Raster tokens of rows row .. row + ROWS of a block that is a tile of BLOCK // (LINES * COLUMNS) frames."""
    tile = row // BLOCK
    tiles_w = grid_w // COLUMNS
    tiles_h = grid_h // LINES
    i = row % BLOCK + tl.arange(0, ROWS)
    frame = tile // (tiles_h * tiles_w) * (BLOCK // (LINES * COLUMNS)) + i // (LINES * COLUMNS)
    line = tile // tiles_w % tiles_h * LINES + i // COLUMNS % LINES
    return ((frame * grid_h + line) * grid_w + tile % tiles_w * COLUMNS + i % COLUMNS).to(tl.int64)


@triton.jit
def load_from_raster(ptr, batch, head, row, grid_h, grid_w, stride_b, stride_s, stride_h, BLOCK: tl.constexpr,
                     LINES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows row .. row + ROWS of one head as [ROWS, D_PAD], counted tile after tile."""
    tokens = tokens_of_rows(row, grid_h, grid_w, BLOCK, LINES, COLUMNS, ROWS)
    offs_d = tl.arange(0, D_PAD)
    base = ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return tl.load(base + tokens[:, None] * stride_s + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def store_in_raster(ptr, x, batch, head, row, grid_h, grid_w, stride_b, stride_s, stride_h, BLOCK: tl.constexpr,
                    LINES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write what `load_from_raster` would read."""
    tokens = tokens_of_rows(row, grid_h, grid_w, BLOCK, LINES, COLUMNS, ROWS)
    offs_d = tl.arange(0, D_PAD)
    base = ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    tl.store(base + tokens[:, None] * stride_s + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=(offs_d < D)[None, :])


@triton.jit(do_not_specialize=["n_heads", "len_q", "len_pad", "grid_h", "grid_w"])
def _blocksparse_bwd_stats_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, lse2_ptr, delta_ptr,
    stride_out_b, stride_out_s, stride_out_h, stride_do_b, stride_do_s, stride_do_h,
    stride_dlse_b, stride_dlse_h, stride_dlse_s,
    n_heads, len_q, len_pad, grid_h, grid_w,
    BLOCK: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_DLSE: tl.constexpr,
):
    bh = tl.program_id(1)
    batch = bh // n_heads
    head = bh % n_heads
    row = tl.program_id(0) * ROWS
    offs = row + tl.arange(0, ROWS)
    if LINES > 0:
        # In the rows of the padding any tokens do.
        at = tl.minimum(row, len_q - ROWS)
        out = load_from_raster(out_ptr, batch, head, at, grid_h, grid_w, stride_out_b, stride_out_s, stride_out_h,
                               BLOCK, LINES, COLUMNS, ROWS, D, D_PAD)
        dout = load_from_raster(dout_ptr, batch, head, at, grid_h, grid_w, stride_do_b, stride_do_s, stride_do_h,
                                BLOCK, LINES, COLUMNS, ROWS, D, D_PAD)
    else:
        out = load_tile(None, out_ptr, batch, head, row, len_q, stride_out_b, stride_out_s, stride_out_h, ROWS, D, D_PAD, False)
        dout = load_tile(None, dout_ptr, batch, head, row, len_q, stride_do_b, stride_do_s, stride_do_h, ROWS, D, D_PAD, False)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * len_q + offs, mask=offs < len_q, other=float("-inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        at = dlse_ptr + batch.to(tl.int64) * stride_dlse_b + head.to(tl.int64) * stride_dlse_h
        delta -= tl.load(at + offs.to(tl.int64) * stride_dlse_s, mask=offs < len_q, other=0.0)
    # A row with nothing to attend: exp2(score - inf) is 0, where exp2(score + inf) would be inf.
    is_empty = lse == float("-inf")
    at = bh.to(tl.int64) * len_pad + offs
    tl.store(lse2_ptr + at, tl.where(is_empty, float("inf"), lse * 1.4426950408889634), mask=offs < len_pad)
    tl.store(delta_ptr + at, tl.where(is_empty, 0.0, delta), mask=offs < len_pad)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, q_desc, do_desc, q_ptr, do_ptr, lse2_ptr, delta_ptr, entry_ptr, q_len_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_do_b, stride_do_s, stride_do_h, stride_qlen_b,
    batch, head, n_entries, len_q, scale_log2,
    BLOCK_Q: tl.constexpr, TILE_M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_Q_LEN: tl.constexpr,
    USE_TMA: tl.constexpr, STAGES: tl.constexpr, EARLY_DP: tl.constexpr,
):
    """Add the gradients of one query head's blocks to dk and dv [TILE_N, D_PAD]."""
    SUB_M: tl.constexpr = BLOCK_Q // TILE_M
    offs_m = tl.arange(0, TILE_M)
    for j in tl.range(0, n_entries * SUB_M, num_stages=STAGES):
        block = tl.load(entry_ptr + j // SUB_M)
        row = block * BLOCK_Q + (j % SUB_M) * TILE_M
        end = len_q
        if HAS_Q_LEN:
            end = block_end(q_len_ptr, batch, stride_qlen_b, block, len_q, BLOCK_Q, HAS_Q_LEN)
        q = load_tile(q_desc, q_ptr, batch, head, row, end, stride_q_b, stride_q_s, stride_q_h, TILE_M, D, D_PAD, USE_TMA)
        do = load_tile(do_desc, do_ptr, batch, head, row, end, stride_do_b, stride_do_s, stride_do_h, TILE_M, D, D_PAD, USE_TMA)
        lse2 = tl.load(lse2_ptr + row + offs_m)
        delta = tl.load(delta_ptr + row + offs_m)
        s = tl.dot(k, q.T)  # [TILE_N, TILE_M]
        # Issued before the exponentials, dP runs under them; issued after dV, it needs fewer registers.
        if EARLY_DP:
            dp = tl.dot(v, do.T)
        p = tl.exp2(s * scale_log2 - lse2[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv)
        if not EARLY_DP:
            dp = tl.dot(v, do.T)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["n_tiles", "n_pairs", "n_heads_k", "len_q", "len_k", "len_pad", "stride_off_b", "stride_off_h",
                               "stride_ent_b", "stride_ent_h", "stride_ord_b", "stride_ord_h", "stride_qlen_b", "stride_klen_b",
                               "grid_h", "grid_w"])
def _blocksparse_bwd_dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse2_ptr, delta_ptr,
    offset_ptr, entry_ptr, order_ptr, q_len_ptr, k_len_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_do_b, stride_do_s, stride_do_h, stride_dk_b, stride_dk_s, stride_dk_h, stride_dv_b, stride_dv_s, stride_dv_h,
    stride_off_b, stride_off_h, stride_ent_b, stride_ent_h, stride_ord_b, stride_ord_h, stride_qlen_b, stride_klen_b,
    n_tiles, n_pairs, n_heads_k, len_q, len_k, len_pad, grid_h, grid_w, scale_log2, scale,
    LINES: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, HAS_Q_LEN: tl.constexpr, HAS_K_LEN: tl.constexpr,
    USE_TMA: tl.constexpr, TMA_STREAM: tl.constexpr, STAGES: tl.constexpr, EARLY_DP: tl.constexpr, EARLY: tl.constexpr,
):
    SUB_N: tl.constexpr = BLOCK_K // TILE_N
    pid = tl.program_id(0)
    # Slots 0 .. early of every head come first, then the others head by head.
    early = tl.minimum(EARLY * SUB_N, n_tiles)
    late = tl.maximum(n_tiles - early, 1)
    if pid < n_pairs * early:
        bh = pid % n_pairs
        slot = pid // n_pairs
    else:
        bh = (pid - n_pairs * early) // late
        slot = early + (pid - n_pairs * early) % late
    batch = bh // n_heads_k
    head_k = bh % n_heads_k
    head = head_k * GROUP
    order = order_ptr + batch.to(tl.int64) * stride_ord_b + head.to(tl.int64) * stride_ord_h
    block = tl.load(order + slot // SUB_N)
    key = block * BLOCK_K + (slot % SUB_N) * TILE_N
    if LINES > 0:
        k = load_from_raster(k_ptr, batch, head_k, key, grid_h, grid_w, stride_k_b, stride_k_s, stride_k_h,
                             BLOCK_K, LINES, COLUMNS, TILE_N, D, D_PAD)
        v = load_from_raster(v_ptr, batch, head_k, key, grid_h, grid_w, stride_v_b, stride_v_s, stride_v_h,
                             BLOCK_K, LINES, COLUMNS, TILE_N, D, D_PAD)
    else:
        k = load_tile(k_desc, k_ptr, batch, head_k, key, len_k, stride_k_b, stride_k_s, stride_k_h, TILE_N, D, D_PAD, USE_TMA)
        v = load_tile(v_desc, v_ptr, batch, head_k, key, len_k, stride_v_b, stride_v_s, stride_v_h, TILE_N, D, D_PAD, USE_TMA)
    dk = tl.zeros([TILE_N, D_PAD], tl.float32)
    dv = tl.zeros([TILE_N, D_PAD], tl.float32)
    for g in range(GROUP):
        head = head_k * GROUP + g
        offsets = offset_ptr + batch.to(tl.int64) * stride_off_b + head.to(tl.int64) * stride_off_h + block
        first = tl.load(offsets)
        n_entries = tl.load(offsets + 1) - first
        entries = entry_ptr + batch.to(tl.int64) * stride_ent_b + head.to(tl.int64) * stride_ent_h + first
        # len_pad is a multiple of 256; written so, the compiler knows and copies 16 bytes at a time.
        stats = (batch.to(tl.int64) * (n_heads_k * GROUP) + head) * (len_pad // 256) * 256
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, q_desc, do_desc, q_ptr, do_ptr, lse2_ptr + stats, delta_ptr + stats, entries, q_len_ptr,
            stride_q_b, stride_q_s, stride_q_h, stride_do_b, stride_do_s, stride_do_h, stride_qlen_b,
            batch, head, n_entries, len_q, scale_log2, BLOCK_Q, TILE_M, D, D_PAD, HAS_Q_LEN, TMA_STREAM, STAGES, EARLY_DP)
    # Rows beyond the valid length may hold anything, a NaN from padding included: they are replaced, not multiplied.
    end = block_end(k_len_ptr, batch, stride_klen_b, block, len_k, BLOCK_K, HAS_K_LEN)
    is_valid = (key + tl.arange(0, TILE_N) < end)[:, None]
    dk = tl.where(is_valid, dk * scale, 0.0)
    dv = tl.where(is_valid, dv, 0.0)
    if LINES > 0:
        # Read again: addresses that were kept in registers through the loop would spill others.
        key = tl.load(order + slot // SUB_N, volatile=True) * BLOCK_K + (slot % SUB_N) * TILE_N
        store_in_raster(dk_ptr, dk, batch, head_k, key, grid_h, grid_w, stride_dk_b, stride_dk_s, stride_dk_h,
                        BLOCK_K, LINES, COLUMNS, TILE_N, D, D_PAD)
        store_in_raster(dv_ptr, dv, batch, head_k, key, grid_h, grid_w, stride_dv_b, stride_dv_s, stride_dv_h,
                        BLOCK_K, LINES, COLUMNS, TILE_N, D, D_PAD)
    else:
        store_tile(dk_ptr, dk, batch, head_k, key, len_k, stride_dk_b, stride_dk_s, stride_dk_h, TILE_N, D, D_PAD)
        store_tile(dv_ptr, dv, batch, head_k, key, len_k, stride_dv_b, stride_dv_s, stride_dv_h, TILE_N, D, D_PAD)


@triton.jit(do_not_specialize=["n_tiles", "n_heads", "len_q", "len_k", "len_pad", "stride_list_b", "stride_list_h",
                               "stride_list_q", "stride_count_b", "stride_count_h", "stride_qlen_b", "stride_klen_b"])
def _blocksparse_bwd_dq_kernel(
    q_desc, k_desc, v_desc, do_desc, q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, lse2_ptr, delta_ptr,
    list_ptr, count_ptr, q_len_ptr, k_len_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_do_b, stride_do_s, stride_do_h, stride_dq_b, stride_dq_s, stride_dq_h,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
    n_tiles, n_heads, len_q, len_k, len_pad, scale_log2, scale,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, HAS_Q_LEN: tl.constexpr, HAS_K_LEN: tl.constexpr, MASK_K: tl.constexpr,
    USE_TMA: tl.constexpr, TMA_STREAM: tl.constexpr, STAGES: tl.constexpr,
):
    SUB_N: tl.constexpr = BLOCK_K // TILE_N
    pid = tl.program_id(0)
    bh = pid // n_tiles
    batch = bh // n_heads
    head = bh % n_heads
    head_k = head // GROUP
    row = (pid % n_tiles) * TILE_M
    block_q = row // BLOCK_Q
    kept = tl.load(count_ptr + batch.to(tl.int64) * stride_count_b + head.to(tl.int64) * stride_count_h + block_q)
    blocks = (list_ptr + batch.to(tl.int64) * stride_list_b + head.to(tl.int64) * stride_list_h
              + block_q.to(tl.int64) * stride_list_q)
    q = load_tile(q_desc, q_ptr, batch, head, row, len_q, stride_q_b, stride_q_s, stride_q_h, TILE_M, D, D_PAD, USE_TMA)
    do = load_tile(do_desc, do_ptr, batch, head, row, len_q, stride_do_b, stride_do_s, stride_do_h, TILE_M, D, D_PAD, USE_TMA)
    offs_m = row + tl.arange(0, TILE_M)
    offs_n = tl.arange(0, TILE_N)
    stats = bh.to(tl.int64) * (len_pad // 256) * 256
    lse2 = tl.load(lse2_ptr + stats + offs_m)
    delta = tl.load(delta_ptr + stats + offs_m)
    dq = tl.zeros([TILE_M, D_PAD], tl.float32)
    for j in tl.range(0, kept * SUB_N, num_stages=STAGES):
        block = tl.load(blocks + j // SUB_N)
        key = block * BLOCK_K + (j % SUB_N) * TILE_N
        end = len_k
        if MASK_K:
            end = block_end(k_len_ptr, batch, stride_klen_b, block, len_k, BLOCK_K, HAS_K_LEN)
        k = load_tile(k_desc, k_ptr, batch, head_k, key, end, stride_k_b, stride_k_s, stride_k_h, TILE_N, D, D_PAD, TMA_STREAM)
        v = load_tile(v_desc, v_ptr, batch, head_k, key, end, stride_v_b, stride_v_s, stride_v_h, TILE_N, D, D_PAD, TMA_STREAM)
        s = tl.dot(q, k.T)  # [TILE_M, TILE_N]
        dp = tl.dot(do, v.T)
        ds = tl.exp2(s * scale_log2 - lse2[:, None]) * (dp - delta[:, None])
        if MASK_K:
            ds = tl.where((key + offs_n < end)[None, :], ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    end_q = block_end(q_len_ptr, batch, stride_qlen_b, block_q, len_q, BLOCK_Q, HAS_Q_LEN)
    # An empty row has p = 0 everywhere, but its q and dO may be padding that holds NaN.
    dq = tl.where((offs_m < end_q)[:, None], dq * scale, 0.0)
    store_tile(dq_ptr, dq, batch, head, row, len_q, stride_dq_b, stride_dq_s, stride_dq_h, TILE_M, D, D_PAD)


def launch_stats(out, dout, lse, dlse, raster: RasterTiles | None = None):
    """Base-2 log-sum-exp and delta, both float32 [B, H, S_pad] with S_pad a multiple of 256; dlse may be None.

    With a raster of tiles, out and dout lie in raster order; lse, dlse and the results go by tiles.
    """
    batch, len_q, heads, head_dim = out.shape
    len_pad = triton.cdiv(len_q, STATS_ALIGNMENT) * STATS_ALIGNMENT
    lse2, delta = torch.empty(2, batch, heads, len_pad, device=out.device, dtype=torch.float32).unbind(0)
    rows = 64
    with torch.cuda.device_of(out):
        _blocksparse_bwd_stats_kernel[(len_pad // rows, batch * heads)](
            out, dout, lse, lse if dlse is None else dlse, lse2, delta, *out.stride()[:3], *dout.stride()[:3],
            *((0, 0, 0) if dlse is None else dlse.stride()), heads, len_q, len_pad, *raster_arguments(raster),
            BLOCK=0 if raster is None else math.prod(raster.tile), **raster_constants(raster),
            ROWS=rows, D=head_dim, D_PAD=triton.next_power_of_2(head_dim), HAS_DLSE=dlse is not None, num_warps=4)
    return lse2, delta


def launch_dkdv(q, k, v, dout, lse2, delta, dk, dv, index, *, softmax_scale: float, config: BackwardConfig):
    """Fill dk and dv [B, S_k, H_kv, D]; `index` carries the transposed lists.

    With a raster of tiles, k, v, dk and dv lie in raster order, but q and dout, which are read many times, tile after tile.
    """
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1], k.shape[2]
    d_pad = triton.next_power_of_2(head_dim)
    tile_m, tile_n = min(config.tile_m, index.block_q), min(config.tile_n, index.block_k)
    use_tma, tma_stream = config.use_tma, config.use_tma and index.streams_whole_rows("q")
    descriptors = [None] * 4
    if use_tma:
        descriptors = describe_rows((q, tile_m), (k, tile_n), (v, tile_n), (dout, tile_m), d_pad=d_pad)
    # Whole blocks: the order of blocks is a permutation, so the last, ragged one may come at any place.
    n_tiles = triton.cdiv(len_k, index.block_k) * (index.block_k // tile_n)
    _, _, q_lengths, k_lengths = index_arguments(index)
    return _blocksparse_bwd_dkdv_kernel[(batch * heads_k * n_tiles,)](
        *descriptors, q, k, v, dout, dk, dv, lse2, delta, index.offsets, index.entries, index.order, q_lengths, k_lengths,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        *broadcast_strides(index.offsets), *broadcast_strides(index.entries), *broadcast_strides(index.order),
        index.length_stride("q"), index.length_stride("k"),
        n_tiles, batch * heads_k, heads_k, len_q, len_k, lse2.shape[2], *raster_arguments(index.raster),
        softmax_scale * LOG2_E, softmax_scale, **raster_constants(index.raster),
        GROUP=heads // heads_k, BLOCK_Q=index.block_q, BLOCK_K=index.block_k, TILE_M=tile_m, TILE_N=tile_n,
        D=head_dim, D_PAD=d_pad, HAS_Q_LEN=index.q_lengths is not None, HAS_K_LEN=index.k_lengths is not None,
        USE_TMA=use_tma, TMA_STREAM=tma_stream, STAGES=config.stages, EARLY_DP=config.early_dp, EARLY=EARLY_BLOCKS,
        num_warps=config.warps)


def launch_dq(q, k, v, dout, lse2, delta, dq, index, *, softmax_scale: float, config: BackwardConfig):
    """Fill dq [B, S_q, H, D]."""
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1], k.shape[2]
    d_pad = triton.next_power_of_2(head_dim)
    tile_m, tile_n = min(config.tile_m, index.block_q), min(config.tile_n, index.block_k)
    use_tma, tma_stream = config.use_tma, config.use_tma and index.streams_whole_rows("k")
    descriptors = [None] * 4
    if use_tma:
        descriptors = describe_rows((q, tile_m), (k, tile_n), (v, tile_n), (dout, tile_m), d_pad=d_pad)
    n_tiles = triton.cdiv(len_q, tile_m)
    return _blocksparse_bwd_dq_kernel[(batch * heads * n_tiles,)](
        *descriptors, q, k, v, dout, dq, lse2, delta, *index_arguments(index),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
        *index.list_strides(), *index.count_strides(), index.length_stride("q"), index.length_stride("k"),
        n_tiles, heads, len_q, len_k, lse2.shape[2], softmax_scale * LOG2_E, softmax_scale,
        GROUP=heads // heads_k, BLOCK_Q=index.block_q, BLOCK_K=index.block_k, TILE_M=tile_m, TILE_N=tile_n,
        D=head_dim, D_PAD=d_pad, HAS_Q_LEN=index.q_lengths is not None, HAS_K_LEN=index.k_lengths is not None,
        MASK_K=index.k_lengths is not None or len_k % index.block_k != 0,
        USE_TMA=use_tma, TMA_STREAM=tma_stream, STAGES=config.stages, num_warps=config.warps)
