"""Engines of Video Sparse Attention: which can serve a call, and why the other cannot.

Importing this module imports no triton; the kernels are imported when they first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnmux.errors import UnsupportedRequestError
from attnmux.spec import Reason
from attnmux_blocksparse.index import BLOCK_SIZES
from attnmux_blocksparse.kernels import HALF_TYPES, can_launch

if TYPE_CHECKING:
    import torch

__all__ = ["ENGINES", "choose_engine", "triton_reasons"]

ENGINES = ("reference", "triton")
"""What can compute the operator: plain PyTorch, or Triton kernels around the block-sparse operator's fastest engine."""


def triton_reasons(q: torch.Tensor, tile_volume: int) -> list[Reason]:
    """Return why the kernels cannot serve q `[B, S, H, D]` in tiles of that many tokens; an empty list if they can."""
    head_size = q.shape[-1]
    reasons = []
    if not can_launch(q):
        reasons.append(
            Reason(
                "device",
                f"q is on {q.device}; Triton and an NVIDIA GPU of sm80 or later are needed",
                "use engine='reference'",
            )
        )
    if q.dtype not in HALF_TYPES:
        reasons.append(
            Reason("dtype", f"q is {q.dtype}; supported: bfloat16, float16", "cast, or use engine='reference'")
        )
    if head_size % 16 or not 16 <= head_size <= 128:
        reasons.append(
            Reason("head_size", f"head_dim={head_size}; supported: 16 to 128 in steps of 16", "use engine='reference'")
        )
    if tile_volume not in BLOCK_SIZES:
        reasons.append(
            Reason(
                "tile_size", f"tiles of {tile_volume} tokens; supported: {list(BLOCK_SIZES)}", "use engine='reference'"
            )
        )
    if q.shape[0] == 0:
        reasons.append(Reason("shape", "an empty batch", "use engine='reference'"))
    return reasons


def choose_engine(name: str | None, q: torch.Tensor, tile_volume: int) -> str:
    """Return the named engine, or the fastest that serves the call.

    Raises:
        UnsupportedRequestError: The named engine is unknown or cannot serve the call; lists every reason.
    """
    if name is not None and name not in ENGINES:
        raise UnsupportedRequestError(
            f"engine={name!r} is unknown to VIDEO_SPARSE_ATTN; expected None or one of {', '.join(ENGINES)}"
        )
    if name == "reference":
        return name
    reasons = triton_reasons(q, tile_volume)
    if name == "triton" and reasons:
        raise UnsupportedRequestError(
            f"engine {name!r} cannot run this call: " + "; ".join(map(str, reasons)) + ".", reasons
        )
    return "reference" if reasons else "triton"
