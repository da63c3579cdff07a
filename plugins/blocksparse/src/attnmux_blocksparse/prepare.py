"""What the constructors, the reference and the operator share, and operators of other packages around this one: index
arithmetic (masks to lists, lists to their transpose), checks of tensors, the type that is computed in, the factor on the scores.
"""

from __future__ import annotations

import math

import torch

from attnmux.errors import UnsupportedRequestError

# A key block chosen more often than this times the mean starts early in the backward (see kernels/backward.py).
HOT_FACTOR = 2


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what the reference computes tensors of a type in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve_scale(softmax_scale: float | None, head_size: int) -> float:
    """Return the factor on the scores; None is `head_size ** -0.5`, and 0.0 is a value.

    Raises:
        UnsupportedRequestError: It is not finite.
    """
    if softmax_scale is None:
        return float(head_size**-0.5)
    # comparisons rather than math.isfinite, which cannot be traced with a dynamic scale; NaN fails them too
    if not -math.inf < softmax_scale < math.inf:
        raise UnsupportedRequestError(f"softmax_scale must be finite, got {softmax_scale!r}")
    return float(softmax_scale)


def check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dtypes: tuple[torch.dtype, ...] | None = None
) -> None:
    """Refuse tensors that do not fit together, naming the first.

    Args:
        q: To be `[B, S_q, H, D]` with D contiguous.
        k: To be `[B, S_k, H_kv, D]`, dtype and device of q, likewise strided; H_kv divides H.
        v: To be like k.
        dtypes: What each may be; None = any floating type.

    Raises:
        UnsupportedRequestError: They are not, or one of them is empty.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise UnsupportedRequestError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
        if dtypes is not None and x.dtype not in dtypes:
            raise UnsupportedRequestError(f"{name} has dtype {x.dtype}; supported: {', '.join(map(str, dtypes))}")
        if x.dtype != q.dtype or x.device != q.device:
            raise UnsupportedRequestError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; type and device must agree"
            )
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise UnsupportedRequestError(f"the last dimension of {name} must be contiguous; strides are {x.stride()}")
        if 0 in x.shape:
            raise UnsupportedRequestError(f"{name} is empty: shape {tuple(x.shape)}")
    if not q.is_floating_point():
        raise UnsupportedRequestError(f"q, k and v must be floating point, got {q.dtype}")
    if k.shape != v.shape:
        raise UnsupportedRequestError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise UnsupportedRequestError(
            f"k and v must have the batch and head size of q, {q.shape[0]} and {q.shape[3]}, got {k.shape[0]} and {k.shape[3]}"
        )
    if q.shape[2] % k.shape[2]:
        raise UnsupportedRequestError(f"q has {q.shape[2]} heads and k has {k.shape[2]}; H must be a multiple of H_kv")


def lists_from_mask(mask: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted positions of the true entries of every row.

    Args:
        mask: bool [..., N].
        width: entries kept per row, at least the longest row and at least 1.

    Returns:
        int32 [..., width], rows padded with zeros, and int32 counts [...].
    """
    n = mask.shape[-1]
    counts = mask.sum(-1, dtype=torch.int32)
    positions = torch.arange(n, device=mask.device, dtype=torch.int32)
    ordered = torch.where(mask, positions, n).sort(-1).values[..., :width]
    if n < width:
        ordered = torch.nn.functional.pad(ordered, (0, width - n), value=n)
    return torch.where(ordered < n, ordered, 0).to(torch.int32).contiguous(), counts


def mask_from_lists(blocks: torch.Tensor, counts: torch.Tensor, num_key_blocks: int) -> torch.Tensor:
    """The block mask, bool [B or 1, H or 1, N_q, num_key_blocks]; entries beyond the count are ignored."""
    is_used = torch.arange(blocks.shape[-1], device=blocks.device) < counts[..., None]
    target = torch.where(is_used, blocks, num_key_blocks).long()
    mask = torch.zeros(*blocks.shape[:-1], num_key_blocks + 1, dtype=torch.bool, device=blocks.device)
    return mask.scatter_(-1, target, True)[..., :num_key_blocks]


def transpose_lists(
    blocks: torch.Tensor, counts: torch.Tensor, num_key_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query blocks of every key block, as compressed rows: no host synchronisation, ascending order.

    Args:
        blocks: int32 [B, H, N_q, K] (either leading dimension may be 1).
        counts: int32 [B, H, N_q].
        num_key_blocks: N_k.

    Returns:
        offsets int32 [B, H, N_k + 1] and entries int32 [B, H, N_q * K]: key block c was chosen by the query blocks
        entries[offsets[c]:offsets[c + 1]]. Entries from offsets[N_k] on are unspecified query blocks.
    """
    batch, heads, _, width = blocks.shape
    is_used = torch.arange(width, device=blocks.device) < counts[..., None]
    keys = torch.where(is_used, blocks, num_key_blocks).flatten(2)
    ordered, source = keys.sort(dim=-1, stable=True)
    bounds = torch.arange(num_key_blocks + 1, device=blocks.device, dtype=blocks.dtype)
    bounds = bounds.expand(batch, heads, num_key_blocks + 1).contiguous()
    offsets = torch.searchsorted(ordered, bounds, out_int32=True)
    return offsets, (source // width).to(torch.int32)


def hot_first_order(offsets: torch.Tensor) -> torch.Tensor:
    """A permutation of the key blocks, int32 [B, H, N_k]: those chosen far above the mean first, both groups ascending."""
    lengths = offsets.diff(dim=-1)
    is_hot = lengths * lengths.shape[-1] > HOT_FACTOR * offsets[..., -1:]
    return is_hot.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)


def valid_tokens(
    lengths: torch.Tensor | None, num_blocks: int, block: int, seq_len: int, device: torch.device
) -> torch.Tensor:
    """Mask [B or 1, S]: whether a token lies within the valid prefix of its block."""
    position = torch.arange(seq_len, device=device)
    if lengths is None:
        return torch.ones(1, seq_len, dtype=torch.bool, device=device)
    return position % block < lengths[:, :num_blocks].repeat_interleave(block, -1)[:, :seq_len]
