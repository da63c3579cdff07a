"""Rotary position embedding, GPT-J style: channels 2i and 2i + 1 form a pair."""

from __future__ import annotations

import torch

from attnmux.errors import UnsupportedRequestError

__all__ = ["apply_rotary"]


def apply_rotary(x: torch.Tensor, freqs_cis: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return `x` with every channel pair turned by its position's angle; `x` is not modified.

    Args:
        x: `[B, S, H, D]`, D even, any strides, floating point.
        freqs_cis: (cos, sin), each `[S, D/2]`, or `[S, D]` with every value repeated twice in place; on the device of x.

    Returns:
        `[B, S, H, D]` in the dtype of `x`, contiguous. Computed in float32, for float64 in float64.

    Raises:
        UnsupportedRequestError: The tables do not fit; names what was expected and what came.

    Source:
        Su et al., RoFormer, arXiv 2104.09864, equation 34.
    """
    if not isinstance(freqs_cis, (tuple, list)) or len(freqs_cis) != 2:
        raise UnsupportedRequestError(f"freqs_cis must be the pair (cos, sin), got {type(freqs_cis).__name__}")
    cos, sin = freqs_cis
    length, dim = x.shape[1], x.shape[3]
    if dim % 2:
        raise UnsupportedRequestError(f"rotary embedding turns channel pairs: head_size={dim} is odd")
    half = (length, dim // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        # element by element: a compiler does not compare tuples of variable sizes
        if table.dim() != 2 or table.shape[0] != length or (table.shape[1] != half[1] and table.shape[1] != dim):
            raise UnsupportedRequestError(
                f"freqs_cis {name} must be {list(half)} or {[length, dim]} for x {list(x.shape)}, got {list(table.shape)}"
            )
        if table.device != x.device:
            raise UnsupportedRequestError(f"freqs_cis {name} is on {table.device}, x on {x.device}; move it there")
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (_half(table, dim).to(compute)[None, :, None, :] for table in (cos, sin))
    even, odd = x.to(compute).reshape(*x.shape[:-1], dim // 2, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def _half(table: torch.Tensor, dim: int) -> torch.Tensor:
    return table if table.shape[1] == dim // 2 else table[:, ::2]
