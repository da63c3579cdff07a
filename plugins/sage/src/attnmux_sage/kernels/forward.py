"""Quantised attention forward in plain Triton, for every card from sm80 on (P V in e4m3 from sm89).

One program per query tile walks its key blocks from the last to the first with an online softmax in base 2: the only block that
reaches beyond the sequence comes first, and so do those that a causal mask cuts.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import triton
import triton.language as tl

from attnmux_blocksparse.kernels.arguments import broadcast_strides
from attnmux_sage.kernels.configs import triton_config
from attnmux_sage.prepare import KEY_BLOCK, P_SHIFT, QUERY_TILE, QuantisedTensors

LN_2 = 0.6931471805599453


@triton.jit(do_not_specialize=["len_q", "len_k", "rows_q", "blocks_k", "heads", "group", "tiles", "stride_list_b", "stride_list_h",
                               "stride_list_q", "stride_count_b", "stride_count_h"])
def _sage_fwd_kernel(
    q8_ptr, q_scale_ptr, k8_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_rest_ptr, shift_ptr, out_ptr, lse_ptr, list_ptr, count_ptr,
    stride_v_b, stride_v_s, stride_v_h, stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
    len_q, len_k, rows_q, blocks_k, heads, group, tiles,
    D: tl.constexpr, D_PAD: tl.constexpr, FP8: tl.constexpr, CAUSAL: tl.constexpr, LISTS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SHIFT: tl.constexpr, LSE: tl.constexpr,
    LN2: tl.constexpr,
):
    pid = tl.program_id(0)
    bh = pid // tiles
    batch = (bh // heads).to(tl.int64)
    head = bh % heads
    head_k = head // group
    bh_k = batch * (heads // group) + head_k
    row = (pid % tiles) * TILE_M
    offs_m = row + tl.arange(0, TILE_M)
    offs_n = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D_PAD)
    q_row = bh.to(tl.int64) * rows_q + offs_m
    q = tl.load(q8_ptr + q_row[:, None] * D_PAD + offs_d[None, :])
    q_scale = tl.load(q_scale_ptr + q_row)
    if LISTS:
        block_q = row // TILE_Q
        kept = tl.load(count_ptr + batch * stride_count_b + head.to(tl.int64) * stride_count_h + block_q)
        entries = list_ptr + batch * stride_list_b + head.to(tl.int64) * stride_list_h + block_q.to(tl.int64) * stride_list_q
    else:
        kept = blocks_k
        if CAUSAL:
            # Rows of padding see what the last row sees.
            last = tl.minimum(row + TILE_M, len_q) - 1 + len_k - len_q
            kept = tl.maximum(tl.minimum(last // BLOCK + 1, blocks_k), 0)
            kept = tl.where(last < 0, 0, kept)
    # A finite start keeps exp2(masked - maximum) at 0 where a whole step is masked; -inf - -inf would be NaN.
    m = tl.full([TILE_M], -1e30, tl.float32)
    l = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, D_PAD], tl.float32)
    for j in tl.range(0, kept, num_stages=STAGES):
        block = kept - 1 - j
        if LISTS:
            block = tl.load(entries + block)
        key = block * BLOCK + offs_n
        k_row = (bh_k * blocks_k + block) * BLOCK + offs_n
        k = tl.load(k8_ptr + k_row[:, None] * D_PAD + offs_d[None, :])
        scale = q_scale * tl.load(k_scale_ptr + bh_k * blocks_k + block)
        s = tl.dot(q, k.T).to(tl.float32) * scale[:, None]  # [TILE_M, BLOCK]
        visible = (key < len_k)[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= offs_m[:, None] + (len_k - len_q))
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - (m_new - SHIFT)[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        if FP8:
            # The order of `prepare.key_order`, in which the columns lie in registers.
            p = p.reshape(TILE_M, BLOCK // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(TILE_M, BLOCK)
            tile = v_ptr + (bh_k * blocks_k + block) * (BLOCK * D_PAD)
            v = tl.load(tile + offs_d[:, None] * BLOCK + offs_n[None, :])
            # A fresh accumulator: the tensor core adds up e4m3 products with about 14 bits.
            acc = acc * alpha[:, None] + tl.dot(p.to(tl.float8e4nv), v.T)
        else:
            mask = (key < len_k)[:, None]
            if D != D_PAD:
                mask = mask & (offs_d < D)[None, :]
            v_head = v_ptr + batch * stride_v_b + head_k.to(tl.int64) * stride_v_h
            v = tl.load(v_head + key.to(tl.int64)[:, None] * stride_v_s + offs_d[None, :], mask=mask, other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    is_empty = l == 0.0
    l = tl.where(is_empty, 1.0, l)
    acc = acc / l[:, None]
    if FP8:
        rest = tl.load(v_rest_ptr + bh_k * D_PAD + offs_d)[None, :]
        acc = tl.where(is_empty[:, None], 0.0, acc * tl.load(v_scale_ptr + bh_k * D_PAD + offs_d)[None, :] + rest)
    mask_m = offs_m < len_q
    out = out_ptr + ((batch * len_q + offs_m)[:, None] * heads + head) * D + offs_d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_d < D)[None, :])
    if LSE:
        at = bh.to(tl.int64) * len_q + offs_m
        lse = (m - SHIFT + tl.log2(l)) * LN2 + tl.load(shift_ptr + at, mask=mask_m, other=0.0)
        tl.store(lse_ptr + at, tl.where(is_empty, float("-inf"), lse), mask=mask_m)


def launch_triton_forward(
    quantised: QuantisedTensors, v, out, lse, *, blocks=None, counts=None, causal: bool = False, config=None
):
    """Fill out [B, S_q, H, D] and lse [B, H, S_q], both contiguous; lse None = not wanted.

    v: [B, S_k, H_kv, D], read where there are no 8-bit values. blocks, counts: int32 lists for tiles of 128 queries, or None.
    """
    batch, len_q, heads, head_dim = out.shape
    heads_k, blocks_k = quantised.k_scale.shape[1:]
    fp8 = quantised.v8 is not None
    config = config or triton_config(fp8)
    tiles = triton.cdiv(len_q, config.tile_m)
    strides = (0,) * 5
    if blocks is not None:
        strides = (*broadcast_strides(blocks), blocks.stride(2), *broadcast_strides(counts))
    return _sage_fwd_kernel[(batch * heads * tiles,)](
        quantised.q8, quantised.q_scale, quantised.k8, quantised.k_scale, quantised.v8 if fp8 else v,
        quantised.v_scale if fp8 else quantised.k_scale, quantised.v_rest if fp8 else quantised.k_scale,
        out if lse is None else quantised.lse_shift, out, out if lse is None else lse,
        quantised.k_scale if blocks is None else blocks, quantised.k_scale if counts is None else counts,
        *v.stride()[:3], *strides, len_q, v.shape[1], quantised.q8.shape[2], blocks_k, heads, heads // heads_k, tiles,
        D=head_dim, D_PAD=quantised.q8.shape[3], FP8=fp8, CAUSAL=causal, LISTS=blocks is not None,
        TILE_M=config.tile_m, TILE_Q=QUERY_TILE, BLOCK=KEY_BLOCK, STAGES=config.stages, SHIFT=P_SHIFT if fp8 else 0.0,
        LSE=lse is not None, LN2=LN_2, num_warps=config.warps,
    )
