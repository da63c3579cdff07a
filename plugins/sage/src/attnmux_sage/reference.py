"""The quantised arithmetic, step by step, in plain PyTorch on any device: what the kernels are held to."""

from __future__ import annotations

import math

import torch

from attnmux_sage.prepare import E4M3_MAX, KEY_BLOCK, QUERY_TILE, QuantisedTensors, dequantise_values

P_SHIFT = math.log2(E4M3_MAX)
"""Weights are computed times 2 ** P_SHIFT for the e4m3 product: the largest becomes the largest e4m3."""


def attend(
    quantised: QuantisedTensors,
    v: torch.Tensor,
    *,
    len_q: int,
    blocks: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    causal: bool = False,
    keys_per_step: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over quantised tensors with an online softmax, in the order of the kernels.

    Every tile of 128 queries walks its key blocks from the last to the first, `keys_per_step` keys at a time (an odd block goes
    into the first step). INT8 products are exact in float32; P is rounded to e4m3 against the running maximum of its step (or to
    the type of v), and each step's P V starts a fresh accumulator that is added in float32.

    Args:
        quantised: From `prepare.quantise` or the kernels.
        v: [B, S_k, H_kv, D]; its type is that of the output, its values are read where `quantised.v8` is None.
        len_q: S_q.
        blocks: int32 [B or 1, H or 1, N_q, K], ascending key blocks of every tile of 128 queries; None = all.
        counts: int32 [B or 1, H or 1, N_q]; None with `blocks`.
        causal: Whether query i sees keys up to i + S_k - S_q.
        keys_per_step: 64 or 128.

    Returns:
        out [B, S_q, H, D] in the type of v and lse [B, H, S_q], float32, natural log; zeros and -inf for an empty row.
    """
    batch, heads, rows, d_pad = quantised.q8.shape
    heads_k, num_blocks = quantised.k_scale.shape[1:]
    len_k, head_dim, device = v.shape[1], v.shape[3], v.device
    tiles = rows // QUERY_TILE
    if blocks is None or counts is None:
        blocks = torch.arange(num_blocks, device=device).expand(1, 1, tiles, num_blocks)
        counts = torch.full((1, 1, tiles), num_blocks, device=device)
    blocks = blocks.long().expand(batch, heads, -1, -1)
    counts = counts.long().expand(batch, heads, -1)
    is_fp8 = quantised.v8 is not None
    if is_fp8:
        values = dequantise_values(quantised)
    else:
        values = torch.nn.functional.pad(
            v.transpose(1, 2), (0, d_pad - head_dim, 0, num_blocks * KEY_BLOCK - len_k)
        ).float()
    shift = P_SHIFT if is_fp8 else 0.0

    q = quantised.q8.float().view(batch, heads, tiles, QUERY_TILE, d_pad)
    q_scale = quantised.q_scale.view(batch, heads, tiles, QUERY_TILE, 1)
    k = quantised.k8.float().view(batch, heads_k, num_blocks, KEY_BLOCK, d_pad)
    values = values.view(batch, heads_k, num_blocks, KEY_BLOCK, d_pad)
    at_b = torch.arange(batch, device=device)[:, None, None, None]
    at_h = (torch.arange(heads, device=device) // (heads // heads_k))[:, None, None]
    row = torch.arange(rows, device=device).view(tiles, QUERY_TILE, 1)
    # A row beyond the end sees what the last row sees, so that it stays finite; it is cut off below.
    last_visible = row.clamp_max(len_q - 1) + (len_k - len_q) if causal else torch.full_like(row, len_k)

    m = q.new_full((batch, heads, tiles, QUERY_TILE, 1), -1e30)
    total = torch.zeros_like(m)
    out = torch.zeros_like(q)
    per_step = keys_per_step // KEY_BLOCK
    steps = -(-int(counts.max()) // per_step)
    for step in range(steps):
        # Position from the end of the list; an odd count leaves the second half of the first step empty.
        empty_halves = -counts % per_step
        position = step * per_step + torch.arange(per_step, device=device) - empty_halves[..., None]
        if per_step == 2:
            is_odd = empty_halves > 0
            first = torch.stack([torch.zeros_like(counts), torch.full_like(counts, -1)], -1)
            position = torch.where((is_odd & (step == 0))[..., None], first, position)
        is_listed = (position >= 0) & (position < counts[..., None])
        entry = (counts[..., None] - 1 - position).clamp(0, blocks.shape[-1] - 1)
        block = blocks.gather(-1, entry)  # [B, H, tiles, per_step]
        block = torch.where(is_listed, block, 0)
        keys = (block[..., None] * KEY_BLOCK + torch.arange(KEY_BLOCK, device=device)).flatten(3)[..., None, :]
        visible = (keys < len_k) & (keys <= last_visible) & is_listed.repeat_interleave(KEY_BLOCK, -1)[..., None, :]
        k_tile = k[at_b, at_h, block].flatten(3, 4)
        scale = q_scale * quantised.k_scale[at_b, at_h, block].repeat_interleave(KEY_BLOCK, -1)[..., None, :]
        scores = ((q @ k_tile.transpose(-1, -2)) * scale).masked_fill(~visible, float("-inf"))
        m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
        p = torch.exp2(scores - (m_new - shift))
        alpha = torch.exp2(m - m_new)
        total = total * alpha + p.sum(-1, keepdim=True)
        m = m_new
        p = p.clamp_max(E4M3_MAX).to(torch.float8_e4m3fn) if is_fp8 else p.to(v.dtype)
        out = out * alpha + p.float() @ values[at_b, at_h, block].flatten(3, 4)
    is_empty = total == 0
    total = total.masked_fill(is_empty, 1.0)
    out = (out / total).flatten(2, 3)
    if quantised.v_scale is not None:
        out = out * quantised.v_scale.repeat_interleave(heads // heads_k, 1)[:, :, None]
    lse = ((m - shift + total.log2()) * math.log(2.0)).masked_fill(is_empty, float("-inf"))
    lse = lse.flatten(2)[..., :len_q] + quantised.lse_shift
    return out[:, :, :len_q, :head_dim].transpose(1, 2).to(v.dtype).contiguous(), lse
