"""The quantised arithmetic, step by step, in plain PyTorch on any device: what the kernels are held to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from attnmux_sage.prepare import E4M3_MAX, KEY_BLOCK, P_SHIFT, QUERY_TILE, QuantisedTensors, dequantise_values

# Rows of all heads whose scores against one step stay in a processor's cache.
_ROWS_AT_ONCE = 8192


class _Keys(NamedTuple):
    """What all rows read: k, values `[B, H_kv, N_k, 64, D']` and k_scale `[B, H_kv, N_k]`, float32; query heads per key head."""

    k: torch.Tensor
    k_scale: torch.Tensor
    values: torch.Tensor
    group: int
    length: int
    dtype: torch.dtype
    is_fp8: bool


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
        out [B, S_q, H, D] in the type of v and lse [B, H, S_q], float32, natural log, without what smoothing took off where
        `quantised.lse_shift` is None; zeros and -inf for an empty row.
    """
    batch, heads, rows, d_pad = quantised.q8.shape
    heads_k, num_blocks = quantised.k_scale.shape[1:]
    len_k, head_dim, device = v.shape[1], v.shape[3], v.device
    is_fp8 = quantised.v8 is not None
    if is_fp8:
        values = dequantise_values(quantised)
    else:
        values = torch.nn.functional.pad(
            v.transpose(1, 2), (0, d_pad - head_dim, 0, num_blocks * KEY_BLOCK - len_k)
        ).float()
    keys = _Keys(
        quantised.k8.float().view(batch, heads_k, num_blocks, KEY_BLOCK, d_pad),
        quantised.k_scale,
        values.view(batch, heads_k, num_blocks, KEY_BLOCK, d_pad),
        heads // heads_k,
        len_k,
        v.dtype,
        is_fp8,
    )
    if blocks is None or counts is None:
        # All queries walk the same list: one tile of any number of rows.
        tile = max(QUERY_TILE, _ROWS_AT_ONCE // (batch * heads) // QUERY_TILE * QUERY_TILE)
        blocks = torch.arange(num_blocks, device=device).expand(batch, heads, 1, num_blocks)
        counts = torch.full((batch, heads, 1), num_blocks, device=device)
        pieces = [(slice(first, first + tile), slice(None)) for first in range(0, rows, tile)]
        needs_mask = causal
    else:
        tiles = max(1, _ROWS_AT_ONCE // (batch * heads * QUERY_TILE))
        blocks, counts = blocks.long().expand(batch, heads, -1, -1), counts.long().expand(batch, heads, -1)
        pieces = [
            (slice(first * QUERY_TILE, (first + tiles) * QUERY_TILE), slice(first, first + tiles))
            for first in range(0, rows // QUERY_TILE, tiles)
        ]
        needs_mask = True
    row = torch.arange(rows, device=device)
    # A row beyond the end sees what the last row sees, so that it stays finite; it is cut off below.
    last_visible = row.clamp_max(len_q - 1) + (len_k - len_q) if causal else torch.full_like(row, len_k)
    outs, lses = zip(
        *(
            _attend_tiles(
                quantised.q8[:, :, part],
                quantised.q_scale[:, :, part],
                last_visible[part],
                keys,
                blocks[:, :, listed],
                counts[:, :, listed],
                keys_per_step // KEY_BLOCK,
                needs_mask,
            )
            for part, listed in pieces
        ),
        strict=True,
    )
    out, lse = torch.cat(outs, 2)[:, :, :len_q, :head_dim], torch.cat(lses, 2)[:, :, :len_q]
    if quantised.v_scale is not None and quantised.v_rest is not None:
        scale, rest = (
            x.repeat_interleave(heads // heads_k, 1)[:, :, None, :head_dim]
            for x in (quantised.v_scale, quantised.v_rest)
        )
        out = torch.where(lse[..., None] == float("-inf"), 0.0, out * scale + rest)
    if quantised.lse_shift is not None:
        lse = lse + quantised.lse_shift
    return out.transpose(1, 2).to(v.dtype).contiguous(), lse


def _attend_tiles(
    q8: torch.Tensor,
    q_scale: torch.Tensor,
    last_visible: torch.Tensor,
    keys: _Keys,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    per_step: int,
    needs_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[B, H, R, D']` of T tiles, whose lists are `[B, H, T, K]`: out `[B, H, R, D']` and the LSE without its shift."""
    batch, heads, rows, d_pad = q8.shape
    tiles, device = blocks.shape[2], q8.device
    shift = P_SHIFT if keys.is_fp8 else 0.0
    q = q8.float().reshape(batch, heads, tiles, -1, d_pad)
    q_scale = q_scale.reshape(batch, heads, tiles, -1, 1)
    last_visible = last_visible.view(tiles, -1, 1)
    at_b = torch.arange(batch, device=device)[:, None, None, None]
    at_h = (torch.arange(heads, device=device) // keys.group)[:, None, None]
    m = q.new_full((*q.shape[:-1], 1), -1e30)
    total = torch.zeros_like(m)
    out = torch.zeros_like(q)
    # Position from the end of the list; an odd count leaves the second half of the first step empty.
    empty_halves = -counts % per_step
    for step in range(-(-int(counts.max()) // per_step)):
        position = step * per_step + torch.arange(per_step, device=device) - empty_halves[..., None]
        if per_step == 2 and step == 0:
            first = torch.stack([torch.zeros_like(counts), torch.full_like(counts, -1)], -1)
            position = torch.where((empty_halves > 0)[..., None], first, position)
        is_listed = (position >= 0) & (position < counts[..., None])
        block = blocks.gather(-1, (counts[..., None] - 1 - position).clamp(0, blocks.shape[-1] - 1))
        block = torch.where(is_listed, block, 0)  # [B, H, T, per_step]
        scale = q_scale * keys.k_scale[at_b, at_h, block].repeat_interleave(KEY_BLOCK, -1)[..., None, :]
        scores = (q @ keys.k[at_b, at_h, block].flatten(3, 4).transpose(-1, -2)) * scale
        # Without lists and a causal mask only the first step reaches beyond the end.
        if needs_mask or step == 0:
            key = (block[..., None] * KEY_BLOCK + torch.arange(KEY_BLOCK, device=device)).flatten(3)[..., None, :]
            visible = (
                (key < keys.length) & (key <= last_visible) & is_listed.repeat_interleave(KEY_BLOCK, -1)[..., None, :]
            )
            scores = scores.masked_fill(~visible, float("-inf"))
        m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
        p = torch.exp2(scores - (m_new - shift))
        alpha = torch.exp2(m - m_new)
        total = total * alpha + p.sum(-1, keepdim=True)
        m = m_new
        p = p.clamp_max(E4M3_MAX).to(torch.float8_e4m3fn) if keys.is_fp8 else p.to(keys.dtype)
        out = out * alpha + p.float() @ keys.values[at_b, at_h, block].flatten(3, 4)
    is_empty = total == 0
    total = total.masked_fill(is_empty, 1.0)
    lse = ((m - shift + total.log2()) * math.log(2.0)).masked_fill(is_empty, float("-inf"))
    return (out / total).reshape(batch, heads, rows, d_pad), lse.reshape(batch, heads, rows)
