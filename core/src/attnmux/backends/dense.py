"""What the dense backends share: a factor on the scores that fused kernels can take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["with_positive_scale"]


def with_positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Return queries and a factor > 0 that give the same scores.

    Fused kernels take the row maximum before they scale: a negative factor turns it into the minimum, and 0 gives NaN (seen
    in cuDNN 9.19 and flash-attn 4.0.0b36).

    Args:
        query: Any shape.
        scale: Finite factor on the scores.
    """
    if scale > 0.0:
        return query, scale
    if scale < 0.0:
        return -query, -scale
    return query * 0.0, 1.0
