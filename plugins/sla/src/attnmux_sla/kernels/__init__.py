"""Engines of everything but the sparse branch: which can serve a call, and why the others cannot.

Importing this module imports no triton; the kernels are imported when they first run.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux.spec import Reason
from attnmux_blocksparse.kernels import HALF_TYPES

__all__ = ["ENGINES", "HALF_TYPES", "choose_engine", "triton_reasons"]

ENGINES = ("reference", "triton")


def triton_reasons(q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_TYPES) -> list[Reason]:
    """Return why the Triton engine cannot serve tensors `[..., D]`; only types, shapes and devices are looked at."""
    head_size = q.shape[-1]
    reasons = []
    if find_spec("triton") is None:
        reasons.append(Reason("triton", "the package triton is not installed", "pip install triton"))
    if not q.is_cuda or torch.version.hip is not None:
        reasons.append(
            Reason("device", f"q is on {q.device.type!r}; an NVIDIA GPU is needed", "use engine='reference'")
        )
    elif (capability := torch.cuda.get_device_capability(q.device)) < (8, 0):
        reasons.append(Reason("architecture", f"compute capability {capability}; at least (8, 0) is needed"))
    if q.dtype not in dtypes:
        supported = ", ".join(map(str, dtypes))
        reasons.append(Reason("dtype", f"q is {q.dtype}; supported: {supported}", "cast, or use engine='reference'"))
    if head_size % 16 or not 16 <= head_size <= 128:
        reasons.append(
            Reason("head_size", f"head_dim={head_size}; supported: 16 to 128 in steps of 16", "use engine='reference'")
        )
    if 0 in q.shape or 0 in k.shape:
        reasons.append(Reason("shape", "a tensor without elements", "use engine='reference'"))
    return reasons


def choose_engine(name: str, q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_TYPES) -> str:
    """Return the named engine, or for an empty name the fastest that serves the call; the reference serves everything.

    Raises:
        UnsupportedRequestError: The named engine cannot serve the call; lists every reason.
    """
    if name == "reference":
        return name
    reasons = triton_reasons(q, k, dtypes)
    if not reasons:
        return "triton"
    if not name:
        return "reference"
    raise UnsupportedRequestError(
        f"engine {name!r} cannot run this call: " + "; ".join(map(str, reasons)) + ".", reasons
    )
