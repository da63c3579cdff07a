"""Quantisation in three launches: partial sums over K and V, their fold, and one that writes all 8-bit tensors.

Partial results are added in a fixed order, so the same input gives the same bits. Every launch reads strided [B, S, H, D].
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
import triton
import triton.language as tl

from attnmux_blocksparse.kernels.arguments import broadcast_strides
from attnmux_sage.kernels.configs import QUANTISE, QuantiseConfig
from attnmux_sage.prepare import (
    E4M3_MAX,
    INT8_MAX,
    KEY_BLOCK,
    LOG2_E,
    QUERY_TILE,
    SCALE_FLOOR,
    SCORE_FLOOR,
    VALUE_FLOOR,
    QuantisedTensors,
    padded_head,
)

SPLITS = 32


@triton.jit
def _load_rows(ptr, rows, end, stride_s, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of one head [ROWS, D_PAD]; zeros from `end` on and beyond D."""
    offs_d = tl.arange(0, D_PAD)
    mask = (rows < end)[:, None]
    if D != D_PAD:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride_s + offs_d[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["len_k", "heads_k", "chunk"])
def _sage_stats_kernel(
    k_ptr, v_ptr, sums_ptr, peaks_ptr, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    len_k, heads_k, chunk, SPLITS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr,
):
    """Sums of K and largest |V| per channel over one chunk of keys: [B * H_kv, SPLITS, D_PAD]."""
    part = tl.program_id(0)
    bh = tl.program_id(1)
    batch = (bh // heads_k).to(tl.int64)
    head = (bh % heads_k).to(tl.int64)
    k_head = k_ptr + batch * stride_k_b + head * stride_k_h
    v_head = v_ptr + batch * stride_v_b + head * stride_v_h
    offs_r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, D_PAD], tl.float32)
    peak = tl.zeros([ROWS, D_PAD], tl.float32)
    end = tl.minimum(part * chunk + chunk, len_k)
    for start in tl.range(part * chunk, end, ROWS, num_stages=4):
        total += _load_rows(k_head, start + offs_r, end, stride_k_s, D, D_PAD).to(tl.float32)
        if FP8:
            peak = tl.maximum(peak, tl.abs(_load_rows(v_head, start + offs_r, end, stride_v_s, D, D_PAD).to(tl.float32)))
    at = (bh * SPLITS + part) * D_PAD + tl.arange(0, D_PAD)
    tl.store(sums_ptr + at, tl.sum(total, 0))
    if FP8:
        tl.store(peaks_ptr + at, tl.max(peak, 0))


@triton.jit
def _hadamard(D_PAD: tl.constexpr):
    """Sylvester's matrix (`prepare.hadamard`), float32 [D_PAD, D_PAD]: -1 where the indices share an odd number of bits."""
    offs = tl.arange(0, D_PAD)
    common = offs[:, None] & offs[None, :]
    common = common ^ (common >> 4)
    # The parity of 4 bits, looked up in a word.
    return tl.where(((0x6996 >> (common & 15)) & 1) != 0, -1.0, 1.0)


@triton.jit(do_not_specialize=["len_k"])
def _sage_fold_kernel(
    sums_ptr, peaks_ptr, mean_ptr, v_scale_ptr, len_k,
    SPLITS: tl.constexpr, D_PAD: tl.constexpr, FP8: tl.constexpr, FLOOR: tl.constexpr, E4M3: tl.constexpr,
):
    """Rotated mean of K and scale of V per channel, from the partial results of one head."""
    bh = tl.program_id(0)
    offs_d = tl.arange(0, D_PAD)
    at = (bh * SPLITS + tl.arange(0, SPLITS))[:, None] * D_PAD + offs_d[None, :]
    mean = tl.sum(tl.load(sums_ptr + at), 0) / len_k
    # The matrix is symmetric: a sum over its columns.
    tl.store(mean_ptr + bh * D_PAD + offs_d, tl.sum(_hadamard(D_PAD) * mean[None, :], 1))
    if FP8:
        peak = tl.maximum(tl.max(tl.load(peaks_ptr + at), 0), FLOOR)
        tl.store(v_scale_ptr + bh * D_PAD + offs_d, tl.div_rn(peak, E4M3))


@triton.jit
def _round_to_int8(x, factor):
    """The product as nearest integer, ties to even, rounded once: adding 1.5 * 2**23 leaves no fraction bits."""
    return (tl.fma(x, factor, 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _quantise_queries(
    pid, q_ptr, mean_ptr, q8_ptr, q_scale_ptr, shift_ptr, stride_b, stride_s, stride_h, len_q, rows_q, heads, group, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr,
    LOG2E: tl.constexpr, INT8: tl.constexpr, FLOOR: tl.constexpr, SCALE_FLOOR: tl.constexpr, PRECISION: tl.constexpr,
):
    """Up to PER_PROGRAM blocks of 64 query rows."""
    offs_d = tl.arange(0, D_PAD)
    blocks_q = rows_q // BLOCK
    programs = tl.cdiv(blocks_q, PER_PROGRAM)
    bh = pid // programs
    batch = bh // heads
    head = bh % heads
    q_head = q_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    rotation = _hadamard(D_PAD).to(q_ptr.dtype.element_ty)
    mean = tl.load(mean_ptr + (batch * (heads // group) + head // group) * D_PAD + offs_d)
    sign = tl.where(scale < 0, -INT8, INT8)
    first = (pid % programs) * PER_PROGRAM
    for block in range(first, tl.minimum(first + PER_PROGRAM, blocks_q)):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        q = tl.dot(_load_rows(q_head, rows, len_q, stride_s, D, D_PAD), rotation, input_precision=PRECISION)
        out_row = bh.to(tl.int64) * rows_q + rows
        peak = tl.maximum(tl.max(tl.abs(q), 1), FLOOR)
        tl.store(q8_ptr + out_row[:, None] * D_PAD + offs_d[None, :], _round_to_int8(q, tl.div_rn(sign, peak)[:, None]))
        tl.store(q_scale_ptr + out_row, tl.maximum(peak * (tl.abs(scale) * (LOG2E / (INT8 * D_PAD))), SCALE_FLOOR))
        shift = tl.sum(q * mean[None, :], 1) * (scale / D_PAD)
        tl.store(shift_ptr + bh.to(tl.int64) * len_q + rows, shift, mask=rows < len_q)


@triton.jit
def _quantise_keys(
    pid, k_ptr, v_ptr, mean_ptr, v_scale_ptr, k8_ptr, v8_ptr, k_scale_ptr,
    stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h, len_k, blocks_k, heads_k,
    D: tl.constexpr, D_PAD: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr, INT8: tl.constexpr,
    FLOOR: tl.constexpr, PRECISION: tl.constexpr,
):
    """Up to PER_PROGRAM blocks of 64 keys and their values."""
    offs_r = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D_PAD)
    programs = tl.cdiv(blocks_k, PER_PROGRAM)
    bh = pid // programs
    batch = (bh // heads_k).to(tl.int64)
    head = (bh % heads_k).to(tl.int64)
    k_head = k_ptr + batch * stride_k_b + head * stride_k_h
    v_head = v_ptr + batch * stride_v_b + head * stride_v_h
    rotation = _hadamard(D_PAD).to(k_ptr.dtype.element_ty)
    mean = tl.load(mean_ptr + bh * D_PAD + offs_d)
    if FP8:
        inverse = tl.div_rn(1.0, tl.load(v_scale_ptr + bh * D_PAD + offs_d))
    first = (pid % programs) * PER_PROGRAM
    for block in range(first, tl.minimum(first + PER_PROGRAM, blocks_k)):
        rows = block * BLOCK + offs_r
        k = tl.dot(_load_rows(k_head, rows, len_k, stride_k_s, D, D_PAD), rotation, input_precision=PRECISION)
        k = tl.where((rows < len_k)[:, None], k - mean[None, :], 0.0)
        out_row = bh.to(tl.int64) * (blocks_k * BLOCK) + rows
        peak = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), FLOOR)
        tl.store(k8_ptr + out_row[:, None] * D_PAD + offs_d[None, :], _round_to_int8(k, tl.div_rn(INT8, peak)))
        tl.store(k_scale_ptr + bh * blocks_k + block, tl.div_rn(peak, INT8))
        if FP8:
            # Rows are loaded in the order in which the score tile's columns lie in registers (`prepare.key_order`).
            key = block * BLOCK + (offs_r // 16) * 16 + ((offs_r // 2) % 2) * 8 + ((offs_r // 4) % 4) * 2 + offs_r % 2
            v = _load_rows(v_head, key, len_k, stride_v_s, D, D_PAD).to(tl.float32)
            v = tl.minimum(tl.maximum(v * inverse[None, :], -448.0), 448.0).to(tl.float8e4nv)
            tile = v8_ptr + (bh.to(tl.int64) * blocks_k + block) * (BLOCK * D_PAD)
            tl.store(tile + offs_d[:, None] * BLOCK + offs_r[None, :], tl.trans(v))


@triton.jit(do_not_specialize=["len_q", "len_k", "rows_q", "blocks_k", "heads", "group", "programs_q"])
def _sage_quantise_kernel(
    q_ptr, k_ptr, v_ptr, mean_ptr, v_scale_ptr, q8_ptr, k8_ptr, v8_ptr, q_scale_ptr, k_scale_ptr, shift_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    len_q, len_k, rows_q, blocks_k, heads, group, programs_q, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
    PER_PROGRAM: tl.constexpr, LOG2E: tl.constexpr, INT8: tl.constexpr, FLOOR: tl.constexpr, SCALE_FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first `programs_q` programs take the rows of Q, the others those of K and V."""
    pid = tl.program_id(0)
    if pid < programs_q:
        _quantise_queries(pid, q_ptr, mean_ptr, q8_ptr, q_scale_ptr, shift_ptr, stride_q_b, stride_q_s, stride_q_h,
                          len_q, rows_q, heads, group, scale, D, D_PAD, BLOCK, PER_PROGRAM, LOG2E, INT8, FLOOR, SCALE_FLOOR,
                          PRECISION)
    else:
        _quantise_keys(pid - programs_q, k_ptr, v_ptr, mean_ptr, v_scale_ptr, k8_ptr, v8_ptr, k_scale_ptr,
                       stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h, len_k, blocks_k, heads // group,
                       D, D_PAD, FP8, BLOCK, PER_PROGRAM, INT8, FLOOR, PRECISION)


@triton.jit(do_not_specialize=["width", "blocks_k", "tiles", "heads", "group", "stride_b", "stride_h", "stride_q"])
def _sage_list_scales_kernel(
    list_ptr, k_scale_ptr, out_ptr, stride_b, stride_h, stride_q, width, blocks_k, tiles, heads, group,
    BLOCK: tl.constexpr,
):
    """K scales in the order of the lists: [B, H, N_q, K]."""
    row = tl.program_id(0)
    bh = row // tiles
    batch = bh // heads
    head = bh % heads
    entries = list_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + (row % tiles).to(tl.int64) * stride_q
    scales = k_scale_ptr + (batch * (heads // group) + head // group) * blocks_k
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        block = tl.load(entries + at, mask=at < width, other=0)
        # Entries beyond the count may hold anything. Their scale is read for an empty list, where it must not be 0: a masked score
        # of -inf would become NaN.
        scale = tl.load(scales + block, mask=(block >= 0) & (block < blocks_k), other=1.0)
        tl.store(out_ptr + row.to(tl.int64) * width + at, scale, mask=at < width)


def launch_list_scales(blocks, k_scale, heads: int):
    """K scales of every list entry, float32 [B, H, N_q, K]; blocks int32 [B or 1, H or 1, N_q, K]."""
    batch, heads_k, blocks_k = k_scale.shape
    tiles, width = blocks.shape[2:]
    out = torch.empty(batch, heads, tiles, width, device=blocks.device, dtype=torch.float32)
    strides = (*broadcast_strides(blocks), blocks.stride(2))
    _sage_list_scales_kernel[(batch * heads * tiles,)](
        blocks, k_scale, out, *strides, width, blocks_k, tiles, heads, heads // heads_k, BLOCK=128, num_warps=1
    )
    return out


def launch_quantise(
    q, k, v, *, softmax_scale: float, fp8_values: bool, config: QuantiseConfig = QUANTISE
) -> QuantisedTensors:
    """Quantise q [B, S_q, H, D] and k, v [B, S_k, H_kv, D], any strides with D contiguous; see `prepare.quantise`."""
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1], k.shape[2]
    d_pad = padded_head(head_dim)
    rows_q, blocks_k = triton.cdiv(len_q, QUERY_TILE) * QUERY_TILE, triton.cdiv(len_k, KEY_BLOCK)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, device=q.device, dtype=dtype)

    sums, peaks = new(batch * heads_k, SPLITS, d_pad), new(batch * heads_k, SPLITS, d_pad)
    mean, v_scale = new(batch, heads_k, d_pad), new(batch, heads_k, d_pad)
    q8, k8 = new(batch, heads, rows_q, d_pad, dtype=torch.int8), new(batch, heads_k, blocks_k * KEY_BLOCK, d_pad, dtype=torch.int8)
    v8 = new(batch, heads_k, blocks_k, d_pad, KEY_BLOCK, dtype=torch.float8_e4m3fn) if fp8_values else None
    q_scale, k_scale, shift = new(batch, heads, rows_q), new(batch, heads_k, blocks_k), new(batch, heads, len_q)
    rows = 32
    chunk = triton.cdiv(triton.cdiv(len_k, SPLITS), rows) * rows
    _sage_stats_kernel[(SPLITS, batch * heads_k)](
        k, v, sums, peaks, *k.stride()[:3], *v.stride()[:3], len_k, heads_k, chunk,
        SPLITS=SPLITS, D=head_dim, D_PAD=d_pad, ROWS=rows, FP8=fp8_values,
    )
    _sage_fold_kernel[(batch * heads_k,)](
        sums, peaks, mean, v_scale, len_k, SPLITS=SPLITS, D_PAD=d_pad, FP8=fp8_values, FLOOR=VALUE_FLOOR, E4M3=E4M3_MAX,
    )
    programs_q = batch * heads * triton.cdiv(rows_q // KEY_BLOCK, config.blocks)
    programs_k = batch * heads_k * triton.cdiv(blocks_k, config.blocks)
    _sage_quantise_kernel[(programs_q + programs_k,)](
        q, k, v, mean, v_scale, q8, k8, k8 if v8 is None else v8, q_scale, k_scale, shift,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        len_q, len_k, rows_q, blocks_k, heads, heads // heads_k, programs_q, softmax_scale,
        D=head_dim, D_PAD=d_pad, FP8=fp8_values, BLOCK=KEY_BLOCK, PER_PROGRAM=config.blocks,
        LOG2E=LOG2_E, INT8=INT8_MAX, FLOOR=SCORE_FLOOR, SCALE_FLOOR=SCALE_FLOOR,
        # Products of half types with 1 and -1 are exact.
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=config.warps,
        num_stages=config.stages,
    )
    return QuantisedTensors(q8, q_scale, k8, k_scale, v8, v_scale if fp8_values else None, shift)
