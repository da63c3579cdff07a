"""Engines of the block-sparse operator: which can serve a call, and why the others cannot.

Importing this module imports no triton; an engine's kernels are imported when it first runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux.spec import Reason
from attnmux_blocksparse.kernels.arguments import tma_reason
from attnmux_blocksparse.kernels.configs import (
    AUTOMATIC_ORDER,
    FA4_BLOCKS_K,
    FA4_BLOCKS_Q,
    FA4_HEAD_SIZES,
    HOPPER_HEAD_SIZES,
)

ENGINES = ("reference", "triton", "hopper", "fa4")
HALF_TYPES = (torch.bfloat16, torch.float16)
# Compute capability that the plain Triton kernels need.
TRITON_MINIMUM = (8, 0)


@dataclass(frozen=True)
class KernelRequest:
    """One call, as the engines judge it.

    q, k, v: the tensors [B, S, H, D] (only their types, shapes, strides and addresses are looked at).
    block_q, block_k: tokens per block. softmax_scale: any number. has_valid_lengths: whether blocks may be partial.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_q: int
    block_k: int
    softmax_scale: float
    has_valid_lengths: bool = False

    @property
    def head_dim(self) -> int:
        """D."""
        return self.q.shape[-1]


def device_capability(x: torch.Tensor) -> tuple[int, int] | None:
    """Compute capability of the NVIDIA card that x is on; None elsewhere."""
    if not x.is_cuda or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(x.device)


def _launches_on(device: int | None) -> bool:
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= TRITON_MINIMUM


# Asked while torch.compile traces too, for which the search for packages is no graph. This is what
# torch.compiler.assume_constant_result sets; the decorator itself would import triton.
_launches_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def can_launch(x: torch.Tensor) -> bool:
    """Whether Triton kernels run where x is."""
    return x.is_cuda and _launches_on(x.device.index)


def reference_reasons(request: KernelRequest) -> list[Reason]:
    """The reference serves every device and floating type."""
    if not request.q.is_floating_point():
        return [Reason("dtype", f"q is {request.q.dtype}; floating point is needed")]
    return []


def triton_reasons(request: KernelRequest) -> list[Reason]:
    """Why the plain Triton engine cannot serve the call; empty if it can."""
    reasons = _gpu_reasons(request, minimum=TRITON_MINIMUM)
    if request.head_dim % 16 or not 16 <= request.head_dim <= 256:
        reasons.append(
            Reason(
                "head_size",
                f"head_dim={request.head_dim}; supported: multiples of 16 from 16 to 256",
                "pad the head, or use engine='reference'",
            )
        )
    return reasons


def hopper_reasons(request: KernelRequest) -> list[Reason]:
    """Why the Hopper engine cannot serve the call; empty if it can.

    It runs what measured fastest on sm90: warp-specialised kernels where `configs` has a row for them, else plain Triton.
    """
    reasons = _gpu_reasons(request, minimum=(9, 0))
    reasons += _newer_card_reasons(request)
    if request.head_dim not in HOPPER_HEAD_SIZES:
        supported = list(HOPPER_HEAD_SIZES)
        reasons.append(
            Reason("head_size", f"head_dim={request.head_dim}; supported: {supported}", "use engine='triton'")
        )
    return reasons + _scale_and_stride_reasons(request)


def fa4_reasons(request: KernelRequest) -> list[Reason]:
    """Why flash-attn 4's block-sparse kernels cannot serve the call; empty if they can.

    Block sizes are bound by the library's tiles on sm90: the key block is its key tile, 128 in both directions; the query
    block is a multiple of its query tile, 128 forward and 64 or 128 backward. It knows one length per sequence at most.
    """
    reasons = []
    if not _is_fa4_installed():
        reasons.append(
            Reason("flash_attn", "flash-attn-4 is not installed", "pip install 'flash-attn-4>=4.0.0b36'"),
        )
    reasons += _gpu_reasons(request, minimum=(9, 0)) + _newer_card_reasons(request)
    if request.head_dim not in FA4_HEAD_SIZES:
        reasons.append(
            Reason(
                "head_size",
                f"head_dim={request.head_dim}; supported: {list(FA4_HEAD_SIZES)}",
                "use engine='triton'",
            )
        )
    for name, size, supported in (
        ("block_q", request.block_q, FA4_BLOCKS_Q),
        ("block_k", request.block_k, FA4_BLOCKS_K),
    ):
        if size not in supported:
            reasons.append(
                Reason(
                    "block_size",
                    f"{name}={size}; supported: {list(supported)}",
                    "use engine='triton', or build the index for other blocks",
                )
            )
    if request.has_valid_lengths:
        reasons.append(
            Reason(
                "partial_blocks", "the index has q_lengths or k_lengths; whole blocks are needed", "use engine='triton'"
            )
        )
    return reasons + _scale_and_stride_reasons(request)


def _is_fa4_installed() -> bool:
    """Whether flash-attn 4 can be imported; flash-attn 2 has the same parent package."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def _newer_card_reasons(request: KernelRequest) -> list[Reason]:
    """Refuses cards after sm90, whose matrix instructions are others."""
    capability = device_capability(request.q)
    if capability is None or capability[0] <= 9:
        return []
    return [Reason("architecture", "the kernels use instructions of sm90 alone", "use engine='triton'")]


def _scale_and_stride_reasons(request: KernelRequest) -> list[Reason]:
    """What the sm90 engines need: the maximum is taken before scaling, and TMA reads q, k and v."""
    reasons = []
    if not request.softmax_scale > 0:
        reasons.append(
            Reason(
                "softmax_scale",
                f"softmax_scale={request.softmax_scale!r}; a positive scale is needed",
                "use engine='triton'",
            )
        )
    for name in ("q", "k", "v"):
        reason = tma_reason(name, getattr(request, name))
        if reason:
            reasons.append(Reason("strides", reason, "use engine='triton', or make the tensor contiguous"))
    return reasons


def _gpu_reasons(request: KernelRequest, minimum: tuple[int, int]) -> list[Reason]:
    """What every GPU engine needs: triton, an NVIDIA card, a half type, something to compute."""
    reasons = []
    if find_spec("triton") is None:
        reasons.append(Reason("triton", "the package triton is not installed", "pip install triton"))
    capability = device_capability(request.q)
    if capability is None:
        reasons.append(
            Reason("device", f"q is on {request.q.device.type!r}; an NVIDIA GPU is needed", "use engine='reference'")
        )
    elif capability < minimum:
        reasons.append(Reason("architecture", f"compute capability {capability}; at least {minimum} is needed"))
    if request.q.dtype not in HALF_TYPES:
        reasons.append(
            Reason("dtype", f"q is {request.q.dtype}; supported: bfloat16, float16", "cast, or use engine='reference'")
        )
    if 0 in request.q.shape or 0 in request.k.shape:
        reasons.append(Reason("shape", "a tensor without elements", "use engine='reference'"))
    return reasons


REASONS = {"reference": reference_reasons, "triton": triton_reasons, "hopper": hopper_reasons, "fa4": fa4_reasons}


def is_supported(engine: str, request: KernelRequest) -> list[Reason]:
    """Why `engine` cannot serve `request`; an empty list if it can."""
    return REASONS[engine](request)


def choose_engine(name: str | None, request: KernelRequest) -> str:
    """The named engine, or the first of the measured order that serves the call.

    Raises:
        UnsupportedRequestError: the named engine is unknown or cannot serve the call, with every reason.
    """
    if name:
        if name not in ENGINES:
            raise UnsupportedRequestError(f"engine={name!r} is not known; engines are {', '.join(ENGINES)}.")
        reasons = is_supported(name, request)
        if reasons:
            raise UnsupportedRequestError(
                f"engine {name!r} cannot run this call: " + "; ".join(map(str, reasons)) + ".", reasons
            )
        return name
    for candidate in AUTOMATIC_ORDER:
        if not is_supported(candidate, request):
            return candidate
    raise UnsupportedRequestError(f"no engine takes q of type {request.q.dtype}.", reference_reasons(request))
