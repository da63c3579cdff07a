"""Quantisation in four launches: partial sums over K and V, their fold, one that writes all 8-bit tensors, what V lost by it.

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
    SAMPLE_ROWS,
    SCALE_FLOOR,
    SCORE_FLOOR,
    VALUE_FLOOR,
    QuantisedTensors,
    padded_head,
    sample_step,
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


@triton.jit(do_not_specialize=["len_k", "heads_k", "chunk", "step"])
def _sage_stats_kernel(
    k_ptr, v_ptr, stats_ptr, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    len_k, heads_k, chunk, step,
    SPLITS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr,
):
    """Per channel, over one chunk: sums of sampled K and of V, the largest and the least V, [4, B * H_kv, SPLITS, D_PAD]."""
    part = tl.program_id(0)
    bh = tl.program_id(1)
    batch = (bh // heads_k).to(tl.int64)
    head = (bh % heads_k).to(tl.int64)
    k_head = k_ptr + batch * stride_k_b + head * stride_k_h
    v_head = v_ptr + batch * stride_v_b + head * stride_v_h
    offs_r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, D_PAD], tl.float32)
    end = tl.minimum(part * chunk + chunk, len_k)
    # Chunks are whole groups.
    first = tl.cdiv(part * (chunk // ROWS), step) * step * ROWS
    for start in tl.range(first, end, step * ROWS, num_stages=4):
        total += _load_rows(k_head, start + offs_r, end, stride_k_s, D, D_PAD).to(tl.float32)
    total_v = tl.zeros([ROWS, D_PAD], tl.float32)
    highest = tl.full([ROWS, D_PAD], float("-inf"), tl.float32)
    lowest = tl.full([ROWS, D_PAD], float("inf"), tl.float32)
    if FP8:
        for start in tl.range(part * chunk, end, ROWS, num_stages=4):
            v = _load_rows(v_head, start + offs_r, end, stride_v_s, D, D_PAD).to(tl.float32)
            is_row = (start + offs_r < end)[:, None]
            total_v += v
            highest = tl.maximum(highest, tl.where(is_row, v, float("-inf")))
            lowest = tl.minimum(lowest, tl.where(is_row, v, float("inf")))
    at = (bh * SPLITS + part) * D_PAD + tl.arange(0, D_PAD)
    size = tl.num_programs(1) * SPLITS * D_PAD
    tl.store(stats_ptr + at, tl.sum(total, 0))
    if FP8:
        tl.store(stats_ptr + size + at, tl.sum(total_v, 0))
        tl.store(stats_ptr + 2 * size + at, tl.max(highest, 0))
        tl.store(stats_ptr + 3 * size + at, tl.min(lowest, 0))


@triton.jit
def _hadamard(D_PAD: tl.constexpr):
    """Sylvester's matrix (`prepare.hadamard`), float32 [D_PAD, D_PAD]: -1 where the indices share an odd number of bits."""
    offs = tl.arange(0, D_PAD)
    common = offs[:, None] & offs[None, :]
    common = common ^ (common >> 4)
    # The parity of 4 bits, looked up in a word.
    return tl.where(((0x6996 >> (common & 15)) & 1) != 0, -1.0, 1.0)


@triton.jit
def _store_rotated(ptr, mean, D_PAD: tl.constexpr):
    """A mean of K, rotated. The matrix is symmetric: a sum over its columns."""
    tl.store(ptr + tl.arange(0, D_PAD), tl.sum(_hadamard(D_PAD) * mean[None, :], 1))


@triton.jit
def _store_values(mean_ptr, scale_ptr, mean, highest, lowest, D_PAD: tl.constexpr, FLOOR: tl.constexpr, E4M3: tl.constexpr):
    """Mean of V, and the scale of V without it, of every channel."""
    offs_d = tl.arange(0, D_PAD)
    peak = tl.maximum(tl.maximum(highest - mean, mean - lowest), FLOOR)
    tl.store(mean_ptr + offs_d, mean)
    tl.store(scale_ptr + offs_d, tl.div_rn(peak, E4M3))


@triton.jit(do_not_specialize=["len_k", "sampled"])
def _sage_fold_kernel(
    stats_ptr, mean_ptr, v_mean_ptr, v_scale_ptr, len_k, sampled,
    SPLITS: tl.constexpr, D_PAD: tl.constexpr, FP8: tl.constexpr, FLOOR: tl.constexpr, E4M3: tl.constexpr,
):
    """Rotated mean of the sampled K, mean and scale of V per channel, from the partial results of one head."""
    bh = tl.program_id(0)
    offs_d = tl.arange(0, D_PAD)
    at = (bh * SPLITS + tl.arange(0, SPLITS))[:, None] * D_PAD + offs_d[None, :]
    size = tl.num_programs(0) * SPLITS * D_PAD
    mean = tl.sum(tl.load(stats_ptr + at), 0) / sampled
    _store_rotated(mean_ptr + bh * D_PAD, mean, D_PAD)
    if FP8:
        v_mean = tl.sum(tl.load(stats_ptr + size + at), 0) / len_k
        highest = tl.max(tl.load(stats_ptr + 2 * size + at), 0)
        lowest = tl.min(tl.load(stats_ptr + 3 * size + at), 0)
        _store_values(v_mean_ptr + bh * D_PAD, v_scale_ptr + bh * D_PAD, v_mean, highest, lowest, D_PAD, FLOOR, E4M3)


@triton.jit(do_not_specialize=["len_k", "programs"])
def _sage_rest_kernel(
    part_ptr, v_mean_ptr, rest_ptr, len_k, programs, D_PAD: tl.constexpr, PARTS: tl.constexpr,
):
    """Mean of V minus its 8-bit values of one head; part: sums of what is left of V minus v_mean, [programs, D_PAD]."""
    bh = tl.program_id(0)
    offs_d = tl.arange(0, D_PAD)
    total = tl.zeros([PARTS, D_PAD], tl.float32)
    for start in range(0, programs, PARTS):
        part = start + tl.arange(0, PARTS)
        at = (bh * programs + part).to(tl.int64)[:, None] * D_PAD + offs_d[None, :]
        total += tl.load(part_ptr + at, mask=(part < programs)[:, None], other=0.0)
    at = bh * D_PAD + offs_d
    mean = tl.sum(total, 0) / len_k
    tl.store(rest_ptr + at, tl.load(v_mean_ptr + at) + mean)


@triton.jit(do_not_specialize=["len_k", "blocks_k"])
def _sage_fold_summary_kernel(
    pooled_ptr, state_ptr, range_ptr, mean_ptr, v_mean_ptr, v_scale_ptr, len_k, blocks_k,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, FP8: tl.constexpr, FLOOR: tl.constexpr,
    E4M3: tl.constexpr,
):
    """What `_sage_fold_kernel` gives, from SLA's pass over K and V.

    The features of a key add up to 1, so the rows of the state do to the sum of V, up to their rounding. That is near enough:
    what the mean is off by is found again in the rest.
    """
    bh = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, D_PAD)
    offs_r = tl.arange(0, ROWS)
    is_channel = (offs_d < D)[None, :]
    total = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(0, blocks_k, ROWS):
        block = start + offs_r
        size = tl.minimum(tl.maximum(len_k - block * BLOCK, 0), BLOCK)
        at = (bh * blocks_k + block)[:, None] * D + offs_d[None, :]
        total += tl.load(pooled_ptr + at, mask=(size > 0)[:, None] & is_channel, other=0.0) * size.to(tl.float32)[:, None]
    mean = tl.sum(total, 0) / len_k
    _store_rotated(mean_ptr + bh * D_PAD, mean, D_PAD)
    if FP8:
        total = tl.zeros([ROWS, D_PAD], tl.float32)
        for start in range(0, D, ROWS):
            feature = start + offs_r
            at = (bh * D + feature)[:, None] * D + offs_d[None, :]
            total += tl.load(state_ptr + at, mask=(feature < D)[:, None] & is_channel, other=0.0)
        v_mean = tl.sum(total, 0) / len_k
        highest = tl.load(range_ptr + bh * 2 * D + offs_d, mask=offs_d < D, other=0.0)
        lowest = tl.load(range_ptr + (bh * 2 + 1) * D + offs_d, mask=offs_d < D, other=0.0)
        _store_values(v_mean_ptr + bh * D_PAD, v_scale_ptr + bh * D_PAD, v_mean, highest, lowest, D_PAD, FLOOR, E4M3)


@triton.jit
def _round_to_int8(x, factor):
    """The product as nearest integer, ties to even, rounded once: adding 1.5 * 2**23 leaves no fraction bits."""
    return (tl.fma(x, factor, 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _quantise_queries(
    pid, q_ptr, mean_ptr, q8_ptr, q_scale_ptr, shift_ptr, pooled_ptr, stride_b, stride_s, stride_h, len_q, rows_q, heads, group,
    scale, D: tl.constexpr, D_PAD: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr,
    LOG2E: tl.constexpr, INT8: tl.constexpr, FLOOR: tl.constexpr, SCALE_FLOOR: tl.constexpr, PRECISION: tl.constexpr,
):
    """Up to PER_PROGRAM blocks of 64 query rows.

    POOL = 0: for each what smoothing takes off its scores. Otherwise the means of POOL such blocks each, which divides PER_PROGRAM.
    """
    offs_d = tl.arange(0, D_PAD)
    blocks_q = rows_q // BLOCK
    programs = tl.cdiv(blocks_q, PER_PROGRAM)
    bh = pid // programs
    batch = bh // heads
    head = bh % heads
    q_head = q_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    rotation = _hadamard(D_PAD).to(q_ptr.dtype.element_ty)
    if POOL == 0:
        mean = tl.load(mean_ptr + (batch * (heads // group) + head // group) * D_PAD + offs_d)
    else:
        total = tl.zeros([D_PAD], tl.float32)
    sign = tl.where(scale < 0, -INT8, INT8)
    first = (pid % programs) * PER_PROGRAM
    for block in range(first, tl.minimum(first + PER_PROGRAM, blocks_q)):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        q = _load_rows(q_head, rows, len_q, stride_s, D, D_PAD)
        if POOL > 0:
            total += tl.sum(q.to(tl.float32), 0)
            if (block + 1) % POOL == 0:
                pooled = block // POOL
                size = tl.minimum(len_q - pooled * POOL * BLOCK, POOL * BLOCK)
                at = (bh.to(tl.int64) * (blocks_q // POOL) + pooled) * D + offs_d
                tl.store(pooled_ptr + at, total / size.to(tl.float32), mask=offs_d < D)
                total = tl.zeros([D_PAD], tl.float32)
        q = tl.dot(q, rotation, input_precision=PRECISION)
        out_row = bh.to(tl.int64) * rows_q + rows
        peak = tl.maximum(tl.max(tl.abs(q), 1), FLOOR)
        tl.store(q8_ptr + out_row[:, None] * D_PAD + offs_d[None, :], _round_to_int8(q, tl.div_rn(sign, peak)[:, None]))
        tl.store(q_scale_ptr + out_row, tl.maximum(peak * (tl.abs(scale) * (LOG2E / (INT8 * D_PAD))), SCALE_FLOOR))
        if POOL == 0:
            shift = tl.sum(q * mean[None, :], 1) * (scale / D_PAD)
            tl.store(shift_ptr + bh.to(tl.int64) * len_q + rows, shift, mask=rows < len_q)


@triton.jit
def _quantise_keys(
    pid, k_ptr, mean_ptr, k8_ptr, k_scale_ptr, stride_b, stride_s, stride_h, len_k, blocks_k, heads_k,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr, INT8: tl.constexpr, FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Up to PER_PROGRAM blocks of 64 keys."""
    offs_d = tl.arange(0, D_PAD)
    programs = tl.cdiv(blocks_k, PER_PROGRAM)
    bh = pid // programs
    k_head = k_ptr + (bh // heads_k).to(tl.int64) * stride_b + (bh % heads_k).to(tl.int64) * stride_h
    rotation = _hadamard(D_PAD).to(k_ptr.dtype.element_ty)
    mean = tl.load(mean_ptr + bh * D_PAD + offs_d)
    first = (pid % programs) * PER_PROGRAM
    for block in range(first, tl.minimum(first + PER_PROGRAM, blocks_k)):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        k = tl.dot(_load_rows(k_head, rows, len_k, stride_s, D, D_PAD), rotation, input_precision=PRECISION)
        k = tl.where((rows < len_k)[:, None], k - mean[None, :], 0.0)
        out_row = bh.to(tl.int64) * (blocks_k * BLOCK) + rows
        peak = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), FLOOR)
        tl.store(k8_ptr + out_row[:, None] * D_PAD + offs_d[None, :], _round_to_int8(k, tl.div_rn(INT8, peak)))
        tl.store(k_scale_ptr + bh * blocks_k + block, tl.div_rn(peak, INT8))


@triton.jit
def _quantise_values(
    pid, v_ptr, mean_ptr, scale_ptr, v8_ptr, part_ptr, stride_b, stride_s, stride_h, len_k, blocks_k, heads_k,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr,
):
    """Up to PER_PROGRAM blocks of 64 values, and the sum over them of what is left when mean and 8-bit values are taken off."""
    offs_r = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D_PAD)
    programs = tl.cdiv(blocks_k, PER_PROGRAM)
    bh = pid // programs
    v_head = v_ptr + (bh // heads_k).to(tl.int64) * stride_b + (bh % heads_k).to(tl.int64) * stride_h
    mean = tl.load(mean_ptr + bh * D_PAD + offs_d)
    scale = tl.load(scale_ptr + bh * D_PAD + offs_d)
    inverse = tl.div_rn(1.0, scale)
    total = tl.zeros([D_PAD], tl.float32)
    first = (pid % programs) * PER_PROGRAM
    for block in range(first, tl.minimum(first + PER_PROGRAM, blocks_k)):
        # Rows are loaded in the order in which the score tile's columns lie in registers (`prepare.key_order`).
        key = block * BLOCK + (offs_r // 16) * 16 + ((offs_r // 2) % 2) * 8 + ((offs_r // 4) % 4) * 2 + offs_r % 2
        v = _load_rows(v_head, key, len_k, stride_s, D, D_PAD).to(tl.float32)
        v = tl.where((key < len_k)[:, None], v - mean[None, :], 0.0)
        v8 = tl.minimum(tl.maximum(v * inverse[None, :], -448.0), 448.0).to(tl.float8e4nv)
        total += tl.sum(v - v8.to(tl.float32) * scale[None, :], 0)
        tile = v8_ptr + (bh.to(tl.int64) * blocks_k + block) * (BLOCK * D_PAD)
        tl.store(tile + offs_d[:, None] * BLOCK + offs_r[None, :], tl.trans(v8))
    tl.store(part_ptr + pid.to(tl.int64) * D_PAD + offs_d, total)


@triton.jit(do_not_specialize=["len_q", "len_k", "rows_q", "blocks_k", "heads", "group", "programs_q", "programs_k"])
def _sage_quantise_kernel(
    q_ptr, k_ptr, v_ptr, mean_ptr, v_mean_ptr, v_scale_ptr, q8_ptr, k8_ptr, v8_ptr, q_scale_ptr, k_scale_ptr, part_ptr, shift_ptr,
    pooled_ptr, stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    len_q, len_k, rows_q, blocks_k, heads, group, programs_q, programs_k, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, FP8: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
    PER_PROGRAM: tl.constexpr, LOG2E: tl.constexpr, INT8: tl.constexpr, FLOOR: tl.constexpr, SCALE_FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first `programs_q` programs take the rows of Q, then `programs_k` those of K, and the others V."""
    pid = tl.program_id(0)
    if pid < programs_q:
        _quantise_queries(pid, q_ptr, mean_ptr, q8_ptr, q_scale_ptr, shift_ptr, pooled_ptr, stride_q_b, stride_q_s, stride_q_h,
                          len_q, rows_q, heads, group, scale, D, D_PAD, POOL, BLOCK, PER_PROGRAM, LOG2E, INT8, FLOOR,
                          SCALE_FLOOR, PRECISION)
    elif pid < programs_q + programs_k:
        _quantise_keys(pid - programs_q, k_ptr, mean_ptr, k8_ptr, k_scale_ptr, stride_k_b, stride_k_s, stride_k_h,
                       len_k, blocks_k, heads // group, D, D_PAD, BLOCK, PER_PROGRAM, INT8, FLOOR, PRECISION)
    elif FP8:
        _quantise_values(pid - programs_q - programs_k, v_ptr, v_mean_ptr, v_scale_ptr, v8_ptr, part_ptr,
                         stride_v_b, stride_v_s, stride_v_h, len_k, blocks_k, heads // group, D, D_PAD, BLOCK, PER_PROGRAM)


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
    batch, len_k, heads_k, head_dim = k.shape
    d_pad, step = padded_head(head_dim), sample_step(len_k)
    groups = triton.cdiv(len_k, SAMPLE_ROWS)
    last = (groups - 1) // step * step
    sampled = last // step * SAMPLE_ROWS + min(SAMPLE_ROWS, len_k - last * SAMPLE_ROWS)
    stats = torch.empty(4 if fp8_values else 1, batch * heads_k, SPLITS, d_pad, device=k.device, dtype=torch.float32)
    mean, v_mean, v_scale = torch.empty(3, batch, heads_k, d_pad, device=k.device, dtype=torch.float32).unbind()
    chunk = triton.cdiv(groups, SPLITS) * SAMPLE_ROWS
    _sage_stats_kernel[(SPLITS, batch * heads_k)](
        k, v, stats, *k.stride()[:3], *v.stride()[:3], len_k, heads_k, chunk, step,
        SPLITS=SPLITS, D=head_dim, D_PAD=d_pad, ROWS=SAMPLE_ROWS, FP8=fp8_values,
    )
    _sage_fold_kernel[(batch * heads_k,)](
        stats, mean, v_mean, v_scale, len_k, sampled, SPLITS=SPLITS, D_PAD=d_pad, FP8=fp8_values, FLOOR=VALUE_FLOOR, E4M3=E4M3_MAX,
    )
    return _launch_write(q, k, v, mean, v_mean, v_scale, None, softmax_scale, fp8_values, config)


def launch_quantise_pooling(
    q, k, v, pooled_k, state, range_v, *, softmax_scale: float, fp8_values: bool, config: QuantiseConfig = QUANTISE
):
    """The same without lse_shift, after SLA's pass over k and v; and the means of every 128 rows of q, [B, H, N_q, D].

    pooled_k [B, H_kv, N_k, D], state [B, H_kv, D, D] and range_v [B, H_kv, 2, D] are those of `attnmux_sla` for blocks of 64 keys
    and features whose sum is 1, float32.
    """
    batch, len_q, heads, head_dim = q.shape
    heads_k, d_pad = k.shape[2], padded_head(head_dim)
    mean, v_mean, v_scale = torch.empty(3, batch, heads_k, d_pad, device=k.device, dtype=torch.float32).unbind()
    _sage_fold_summary_kernel[(batch * heads_k,)](
        pooled_k, state, range_v, mean, v_mean, v_scale, k.shape[1], pooled_k.shape[2],
        BLOCK=KEY_BLOCK, ROWS=128, D=head_dim, D_PAD=d_pad, FP8=fp8_values, FLOOR=VALUE_FLOOR, E4M3=E4M3_MAX, num_warps=8,
    )
    tiles = triton.cdiv(len_q, QUERY_TILE)
    pooled_q = torch.empty(batch, heads, tiles, head_dim, device=q.device, dtype=torch.float32)
    return _launch_write(q, k, v, mean, v_mean, v_scale, pooled_q, softmax_scale, fp8_values, config), pooled_q


def _launch_write(q, k, v, mean, v_mean, v_scale, pooled_q, softmax_scale: float, fp8_values: bool, config) -> QuantisedTensors:
    """Write the 8-bit tensors, and lse_shift or, where there is room for it, pooled_q."""
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1], k.shape[2]
    d_pad = padded_head(head_dim)
    rows_q, blocks_k = triton.cdiv(len_q, QUERY_TILE) * QUERY_TILE, triton.cdiv(len_k, KEY_BLOCK)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, device=q.device, dtype=dtype)

    q8, k8 = new(batch, heads, rows_q, d_pad, dtype=torch.int8), new(batch, heads_k, blocks_k * KEY_BLOCK, d_pad, dtype=torch.int8)
    v8 = new(batch, heads_k, blocks_k, d_pad, KEY_BLOCK, dtype=torch.float8_e4m3fn) if fp8_values else None
    q_scale, k_scale = new(batch, heads, rows_q), new(batch, heads_k, blocks_k)
    shift = new(batch, heads, len_q) if pooled_q is None else None
    parts = triton.cdiv(blocks_k, config.blocks)
    programs_q, programs_k = batch * heads * triton.cdiv(rows_q // KEY_BLOCK, config.blocks), batch * heads_k * parts
    part = new(programs_k if fp8_values else 1, d_pad)
    _sage_quantise_kernel[(programs_q + programs_k * (2 if fp8_values else 1),)](
        q, k, v, mean, v_mean, v_scale, q8, k8, k8 if v8 is None else v8, q_scale, k_scale, part,
        q_scale if shift is None else shift, q_scale if pooled_q is None else pooled_q,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        len_q, len_k, rows_q, blocks_k, heads, heads // heads_k, programs_q, programs_k, softmax_scale,
        D=head_dim, D_PAD=d_pad, FP8=fp8_values, POOL=0 if pooled_q is None else QUERY_TILE // KEY_BLOCK,
        BLOCK=KEY_BLOCK, PER_PROGRAM=config.blocks, LOG2E=LOG2_E, INT8=INT8_MAX, FLOOR=SCORE_FLOOR, SCALE_FLOOR=SCALE_FLOOR,
        # Products of half types with 1 and -1 are exact.
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=config.warps,
        num_stages=config.stages,
    )
    if v8 is None:
        return QuantisedTensors(q8, q_scale, k8, k_scale, None, None, None, shift)
    v_rest = torch.empty_like(v_scale)
    _sage_rest_kernel[(batch * heads_k,)](part, v_mean, v_rest, len_k, parts, D_PAD=d_pad, PARTS=64, num_warps=8)
    return QuantisedTensors(q8, q_scale, k8, k_scale, v8, v_scale, v_rest, shift)
