"""Engines of everything but the sparse branch: which can serve a call, and why the others cannot.

Importing this module imports no triton; the kernels are imported when they first run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnmux_blocksparse.kernels import HALF_TYPES, gpu_reasons, head_size_reasons, pick_engine

if TYPE_CHECKING:
    import torch

    from attnmux.spec import Reason

__all__ = ["ENGINES", "HALF_TYPES", "choose_engine", "triton_reasons"]

ENGINES = ("reference", "triton")


def triton_reasons(q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_TYPES) -> list[Reason]:
    """Return why the Triton engine cannot serve tensors `[..., D]`; only types, shapes and devices are looked at."""
    return gpu_reasons(q, k, dtypes=dtypes) + head_size_reasons(q.shape[-1], 128)


def choose_engine(name: str, q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_TYPES) -> str:
    """Return the named engine, or for an empty name the fastest that serves the call; the reference serves everything.

    Raises:
        UnsupportedRequestError: The named engine cannot serve the call; lists every reason.
    """
    return pick_engine(
        name,
        ENGINES,
        ("triton", "reference"),
        lambda engine: triton_reasons(q, k, dtypes) if engine == "triton" else [],
    )
