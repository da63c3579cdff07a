"""The oracle: block-sparse attention written out over the whole score matrix. Any device, any floating type."""

from __future__ import annotations

from typing import Protocol

import torch

from attnmux_blocksparse import prepare


class Lists(Protocol):
    """What is read of a `BlockIndex`, which documents it."""

    @property
    def blocks(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def counts(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def block_q(self) -> int: ...  # noqa: D102
    @property
    def block_k(self) -> int: ...  # noqa: D102
    @property
    def q_lengths(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def k_lengths(self) -> torch.Tensor | None: ...  # noqa: D102


def token_mask(index: Lists, batch: int, heads: int, len_q: int, len_k: int) -> torch.Tensor:
    """Mask [B, H, S_q, S_k]: whether the query token attends to the key token."""
    blocks_k = -(-len_k // index.block_k)
    blocks = prepare.mask_from_lists(index.blocks, index.counts, blocks_k)
    tokens = blocks.repeat_interleave(index.block_q, 2)[:, :, :len_q].repeat_interleave(index.block_k, 3)[..., :len_k]
    device = index.blocks.device
    is_valid_q = prepare.valid_tokens(index.q_lengths, index.blocks.shape[2], index.block_q, len_q, device)
    is_valid_k = prepare.valid_tokens(index.k_lengths, blocks_k, index.block_k, len_k, device)
    return (tokens & is_valid_q[:, None, :, None] & is_valid_k[:, None, None, :]).expand(batch, heads, len_q, len_k)


def _clean_heads_first(
    x: torch.Tensor, lengths: torch.Tensor | None, block: int, repeats: int, dtype: torch.dtype
) -> torch.Tensor:
    """[B, S, H, D] -> [B, H * repeats, S, D], with zeros instead of the padding of partial blocks."""
    is_valid = prepare.valid_tokens(lengths, 0 if lengths is None else lengths.shape[1], block, x.shape[1], x.device)
    return torch.where(is_valid[:, :, None, None], x, 0).to(dtype).transpose(1, 2).repeat_interleave(repeats, 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: Lists, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable block-sparse attention.

    Args:
        q: [B, S_q, H, D], any strides.
        k: [B, S_k, H_kv, D], any strides.
        v: like k.
        index: a `BlockIndex`, or anything with its tensors and block sizes.
        softmax_scale: any number.

    Returns:
        out [B, S_q, H, D] in the type of q, and lse [B, H, S_q], natural log, in float32 (float64 for float64 inputs).

    Numerics: half types are computed in float32.
    """
    dtype, repeats = compute_dtype(q.dtype), q.shape[2] // k.shape[2]
    q_ = _clean_heads_first(q, index.q_lengths, index.block_q, 1, dtype)
    k_ = _clean_heads_first(k, index.k_lengths, index.block_k, repeats, dtype)
    v_ = _clean_heads_first(v, index.k_lengths, index.block_k, repeats, dtype)
    mask = token_mask(index, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    is_empty = ~mask.any(-1)
    scores = (q_ @ k_.transpose(-1, -2)) * softmax_scale
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(is_empty[..., None], 0.0)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(is_empty[..., None], 0.0)
    out = (weights @ v_).transpose(1, 2).to(q.dtype).contiguous()
    return out, lse.masked_fill(is_empty, float("-inf"))


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: Lists,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_forward` in closed form.

    Args:
        dout: [B, S_q, H, D].
        dlse: [B, H, S_q], or None for zeros.
        q: as in the forward, and so the rest.
        k: [B, S_k, H_kv, D].
        v: like k.
        index: a `BlockIndex`.
        softmax_scale: any number.

    Returns:
        dq, dk, dv in the shapes and types of q, k, v. With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(dO O) + dLSE),
        dQ = scale dS K, dK = scale dS^T Q.
    """
    dtype, repeats = compute_dtype(q.dtype), q.shape[2] // k.shape[2]
    q_ = _clean_heads_first(q, index.q_lengths, index.block_q, 1, dtype)
    k_ = _clean_heads_first(k, index.k_lengths, index.block_k, repeats, dtype)
    v_ = _clean_heads_first(v, index.k_lengths, index.block_k, repeats, dtype)
    do = _clean_heads_first(dout, index.q_lengths, index.block_q, 1, dtype)
    mask = token_mask(index, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    is_empty = ~mask.any(-1, keepdim=True)
    scores = ((q_ @ k_.transpose(-1, -2)) * softmax_scale).masked_fill(~mask, float("-inf")).masked_fill(is_empty, 0.0)
    weights = scores.softmax(-1).masked_fill(is_empty, 0.0)
    dweights = do @ v_.transpose(-1, -2)
    delta = (weights * dweights).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(dtype).masked_fill(is_empty[..., 0], 0.0)
    dscores = weights * (dweights - delta[..., None]) * softmax_scale
    heads_k = k.shape[2]

    def sum_groups(x: torch.Tensor) -> torch.Tensor:
        """[B, H, S, D] -> [B, S, H_kv, D], summed over the query heads of each key head."""
        return x.reshape(x.shape[0], heads_k, repeats, *x.shape[2:]).sum(2).transpose(1, 2)

    grads = (
        (dscores @ k_).transpose(1, 2),
        sum_groups(dscores.transpose(-1, -2) @ q_),
        sum_groups(weights.transpose(-1, -2) @ do),
    )
    dq, dk, dv = (g.to(x.dtype).contiguous() for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv
