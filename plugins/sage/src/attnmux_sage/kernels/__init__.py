"""Engines of quantised attention: which can serve a call, and why the others cannot.

Importing this module imports no triton; an engine's kernels are imported when it first runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux.spec import Reason
from attnmux_blocksparse.kernels import HALF_TYPES, device_capability
from attnmux_blocksparse.kernels.arguments import tma_reason
from attnmux_sage.kernels.configs import AUTOMATIC_ORDER
from attnmux_sage.kernels.official import official_reasons

__all__ = [
    "ENGINES",
    "HALF_TYPES",
    "PV_TYPES",
    "KernelRequest",
    "choose_engine",
    "default_pv",
    "is_supported",
    "keys_per_step",
]

ENGINES = ("reference", "triton", "hopper", "official")
PV_TYPES = ("fp8", "bf16")
# Compute capabilities from which on there are instructions for INT8 and half types, and for e4m3.
HALF_MINIMUM, FP8_MINIMUM = (8, 0), (8, 9)


@dataclass(frozen=True)
class KernelRequest:
    """One call, as the engines judge it.

    q, k, v: the tensors [B, S, H, D] (only their types, shapes, strides and addresses are looked at). pv: "fp8" or "bf16".
    causal: whether a query sees keys up to its own position. has_lists: whether lists of key blocks are given.
    needs_lse: whether the log-sum-exp is wanted. softmax_scale: any finite number.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pv: str
    causal: bool = False
    has_lists: bool = False
    needs_lse: bool = False
    softmax_scale: float = 1.0


def default_pv(q: torch.Tensor) -> str:
    """In what P V is computed where nobody says: e4m3, on cards without it the type of v."""
    capability = device_capability(q)
    return "bf16" if capability is not None and capability < FP8_MINIMUM else "fp8"


def keys_per_step(device: torch.device, causal: bool) -> int:
    """Keys between two looks at the maximum against which weights are rounded: as the engine of half types has it there.

    The reference takes as many, so that on one device all engines but `official` round alike.
    """
    if causal or (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9):
        return 64
    return 128


def reference_reasons(request: KernelRequest) -> list[Reason]:
    """The reference serves every device."""
    return []


def triton_reasons(request: KernelRequest) -> list[Reason]:
    """Why the plain Triton engine cannot serve the call; empty if it can."""
    return _gpu_reasons(request, FP8_MINIMUM if request.pv == "fp8" else HALF_MINIMUM)


def hopper_reasons(request: KernelRequest) -> list[Reason]:
    """Why the Hopper engine cannot serve the call; empty if it can."""
    reasons = _gpu_reasons(request, (9, 0))
    capability = device_capability(request.q)
    if capability is not None and capability[0] > 9:
        reasons.append(Reason("architecture", "the kernel uses instructions of sm90 alone", "use engine='triton'"))
    if request.causal:
        reasons.append(Reason("causal", "causal=True is not served", "use engine='triton'"))
    if request.pv == "bf16" and (reason := tma_reason("v", request.v)):
        reasons.append(Reason("strides", reason, "use engine='triton', or make the tensor contiguous"))
    return reasons


def _gpu_reasons(request: KernelRequest, minimum: tuple[int, int]) -> list[Reason]:
    """What every engine of ours needs on a GPU: triton, an NVIDIA card, a half type."""
    reasons = []
    if find_spec("triton") is None:
        reasons.append(Reason("triton", "the package triton is not installed", "pip install triton"))
    capability = device_capability(request.q)
    if capability is None:
        reasons.append(
            Reason("device", f"q is on {request.q.device.type!r}; an NVIDIA GPU is needed", "use engine='reference'")
        )
    elif capability < minimum:
        hint = "use pv='bf16'" if request.pv == "fp8" and capability >= HALF_MINIMUM else "use engine='reference'"
        reasons.append(Reason("architecture", f"compute capability {capability}; at least {minimum} is needed", hint))
    if request.q.dtype not in HALF_TYPES:
        reasons.append(
            Reason("dtype", f"q is {request.q.dtype}; supported: bfloat16, float16", "cast, or use engine='reference'")
        )
    return reasons


REASONS = {
    "reference": reference_reasons,
    "triton": triton_reasons,
    "hopper": hopper_reasons,
    "official": official_reasons,
}


def is_supported(engine: str, request: KernelRequest) -> list[Reason]:
    """Why `engine` cannot serve `request`; an empty list if it can."""
    return REASONS[engine](request)


def choose_engine(name: str, request: KernelRequest) -> str:
    """The named engine, or for an empty name the first of the measured order that serves the call.

    Raises:
        UnsupportedRequestError: The named engine is unknown or cannot serve the call, with every reason.
    """
    if not name:
        return next(engine for engine in AUTOMATIC_ORDER if not is_supported(engine, request))
    if name not in ENGINES:
        raise UnsupportedRequestError(f"engine={name!r} is not known; engines are {', '.join(ENGINES)}")
    reasons = is_supported(name, request)
    if reasons:
        raise UnsupportedRequestError(
            f"engine {name!r} cannot run this call: " + "; ".join(map(str, reasons)) + ".", reasons
        )
    return name
