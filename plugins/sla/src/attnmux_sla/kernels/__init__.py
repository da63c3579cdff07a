"""Engines of everything but the sparse branch: which can serve a call, and why the others cannot.

Importing this module imports no triton; the kernels are imported when they first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnmux.spec import Reason
from attnmux_blocksparse.kernels import HALF_TYPES, TRITON_MINIMUM, choose, empty_reasons, gpu_reasons

if TYPE_CHECKING:
    import torch

__all__ = ["ENGINES", "HALF_TYPES", "choose_engine", "triton_reasons"]

ENGINES = ("reference", "triton")
ORDER = ENGINES[::-1]


def triton_reasons(q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_TYPES) -> list[Reason]:
    """Return why the Triton engine cannot serve tensors `[..., D]`; only types, shapes and devices are looked at."""
    head_size, reasons = q.shape[-1], gpu_reasons(q, TRITON_MINIMUM, dtypes=dtypes)
    if head_size % 16 or not 16 <= head_size <= 128:
        reasons.append(
            Reason("head_size", f"head_dim={head_size}; supported: 16 to 128 in steps of 16", "use engine='reference'")
        )
    return reasons + empty_reasons(q, k)


def choose_engine(name: str, q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_TYPES) -> str:
    """Return the named engine, or for an empty name the fastest that serves the call; the reference serves everything.

    Raises:
        UnsupportedRequestError: The named engine is unknown or cannot serve the call; lists every reason.
    """
    engine = choose(name, ORDER, ENGINES, lambda engine: triton_reasons(q, k, dtypes) if engine == "triton" else [])
    assert engine is not None
    return engine
