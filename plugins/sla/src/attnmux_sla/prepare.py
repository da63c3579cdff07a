"""What is decided before attention: how many key blocks every query block keeps, and which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse.prepare import compute_dtype

if TYPE_CHECKING:
    from attnmux.backend import LayerPlace

__all__ = [
    "EPS",
    "FEATURE_MAPS",
    "LINEAR_KEYS",
    "TopkRule",
    "check_topk_ratio",
    "count_blocks",
    "count_kept_blocks",
    "order_of_scale",
    "pool_blocks",
]

EPS = 1e-5
"""Added to the denominator of the linear branch, as published."""

FEATURE_MAPS = ("softmax", "elu", "relu")
LINEAR_KEYS = ("all", "complement", "marginal")


@dataclass(frozen=True)
class TopkRule:
    """One line of a top-k schedule: a fraction for some layers during some steps.

    Attributes:
        topk_ratio: Fraction of key blocks kept, in (0, 1].
        layers: First and last layer, from 0, both included; None = every layer, also one without an index.
        steps: First and last denoising step, likewise; None = every step.

    Raises:
        UnsupportedRequestError: The fraction is out of range, or a range does not ascend from 0 on.
    """

    topk_ratio: float
    layers: tuple[int, int] | None = None
    steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_topk_ratio(self.topk_ratio)
        for name in ("layers", "steps"):
            bounds = getattr(self, name)
            if bounds is not None and (len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]):
                raise UnsupportedRequestError(f"{name} must be (first, last) with 0 <= first <= last, got {bounds!r}")

    def covers_step(self, step: int) -> bool:
        """Whether the rule holds during this step."""
        return self.steps is None or self.steps[0] <= step <= self.steps[1]

    def covers_layer(self, place: LayerPlace) -> bool:
        """Whether the rule holds for the layer at this place."""
        return self.layers is None or place.is_within(*self.layers)


def count_blocks(length: int, block: int) -> int:
    """Return the blocks that `length` tokens make, the last one perhaps short."""
    return -(-length // block)


def check_topk_ratio(topk_ratio: float) -> float:
    """Return the fraction of key blocks to keep if it is in (0, 1].

    Raises:
        UnsupportedRequestError: It is not, NaN included.
    """
    if isinstance(topk_ratio, bool) or not 0 < topk_ratio <= 1:
        raise UnsupportedRequestError(f"topk_ratio must be a fraction of the key blocks in (0, 1], got {topk_ratio!r}")
    return topk_ratio


def count_kept_blocks(topk_ratio: float, num_key_blocks: int, protected_blocks: int = 0) -> int:
    """Return how many key blocks every query block keeps.

    Args:
        topk_ratio: Fraction of the key blocks, in (0, 1].
        num_key_blocks: N_k, >= 1.
        protected_blocks: Leading key blocks that are always kept; they count as kept ones.

    Returns:
        max(1, floor(topk_ratio * N_k + 1e-6)), at least `protected_blocks`, at most N_k. The summand undoes binary rounding:
        0.29 of 100 blocks is 29, where truncation of 28.999... gives 28.
    """
    kept = int(check_topk_ratio(topk_ratio) * num_key_blocks + 1e-6)
    return min(max(1, kept, protected_blocks), num_key_blocks)


def order_of_scale(softmax_scale: float) -> float:
    """Return 1, 0 or -1: how a factor on the scores orders them. 0 makes all blocks equal."""
    return float((softmax_scale > 0) - (softmax_scale < 0))


def pool_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Average the tokens of every block, the last one over the tokens that it has.

    Args:
        x: `[B, S, H, D]`, any strides; not modified.
        block: Tokens of a block.

    Returns:
        `[B, H, ceil(S / block), D]`, float32, float64 for float64.
    """
    B, S, H, D = x.shape
    num_blocks = count_blocks(S, block)
    padded = torch.nn.functional.pad(x.to(compute_dtype(x.dtype)), (0, 0, 0, 0, 0, num_blocks * block - S))
    sizes = (S - block * torch.arange(num_blocks, device=x.device)).clamp(max=block)
    sums = padded.view(B, num_blocks, block, H, D).sum(2).transpose(1, 2).contiguous()
    return sums / sizes[:, None]
