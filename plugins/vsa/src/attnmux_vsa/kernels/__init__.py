"""Engines of Video Sparse Attention: which can serve a call, and why the other cannot.

Importing this module imports no triton; the kernels are imported when they first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnmux.spec import Reason
from attnmux_blocksparse.index import BLOCK_SIZES
from attnmux_blocksparse.kernels import gpu_reasons, head_size_reasons, pick_engine

if TYPE_CHECKING:
    import torch

__all__ = ["ENGINES", "choose_engine", "triton_reasons"]

ENGINES = ("reference", "triton")
"""What can compute the operator: plain PyTorch, or Triton kernels around the block-sparse operator's fastest engine."""


def triton_reasons(q: torch.Tensor, tile_volume: int) -> list[Reason]:
    """Return why the kernels cannot serve q `[B, S, H, D]` in tiles of that many tokens; an empty list if they can."""
    reasons = gpu_reasons(q, q) + head_size_reasons(q.shape[-1], 128)
    if tile_volume not in BLOCK_SIZES:
        reasons.append(
            Reason(
                "tile_size", f"tiles of {tile_volume} tokens; supported: {list(BLOCK_SIZES)}", "use engine='reference'"
            )
        )
    return reasons


def choose_engine(name: str | None, q: torch.Tensor, tile_volume: int) -> str:
    """Return the named engine, or the fastest that serves the call.

    Raises:
        UnsupportedRequestError: The named engine is unknown or cannot serve the call; lists every reason.
    """
    return pick_engine(
        name,
        ENGINES,
        ("triton", "reference"),
        lambda engine: triton_reasons(q, tile_volume) if engine == "triton" else [],
    )
