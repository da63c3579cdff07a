"""Engines of the block-sparse operator: which can serve a call, and why the others cannot.

`pick_engine` and `gpu_reasons` are for operators of other packages around this one, too: a choice of an engine reads alike
everywhere, and what a kernel needs of a card is said once.

Importing this module imports no triton; an engine's kernels are imported when it first runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


def _has_triton() -> bool:
    return find_spec("triton") is not None


def _reaches(device: int | None, major: int, minor: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (major, minor)


# Asked while torch.compile traces too, for which the search for packages is no graph. This is what
# torch.compiler.assume_constant_result sets; the decorator itself would import triton.
_has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]
_reaches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def can_launch(x: torch.Tensor) -> bool:
    """Whether Triton kernels run where x is."""
    return x.is_cuda and torch.version.hip is None and _has_triton() and _reaches(x.device.index, *TRITON_MINIMUM)


def reference_reasons(request: KernelRequest) -> list[Reason]:
    """The reference serves every device and floating type."""
    if not request.q.is_floating_point():
        return [Reason("dtype", f"q is {request.q.dtype}; floating point is needed")]
    return []


def triton_reasons(request: KernelRequest) -> list[Reason]:
    """Why the plain Triton engine cannot serve the call; empty if it can."""
    return gpu_reasons(request.q, request.k) + head_size_reasons(request.head_dim, 256)


def hopper_reasons(request: KernelRequest) -> list[Reason]:
    """Why the Hopper engine cannot serve the call; empty if it can.

    It runs what measured fastest on sm90: warp-specialised kernels where `configs` has a row for them, else plain Triton.
    """
    reasons = gpu_reasons(request.q, request.k, minimum=(9, 0))
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
    reasons += gpu_reasons(request.q, request.k, minimum=(9, 0)) + _newer_card_reasons(request)
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


def gpu_reasons(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    minimum: tuple[int, int] = TRITON_MINIMUM,
    dtypes: Sequence[torch.dtype] = HALF_TYPES,
) -> list[Reason]:
    """What every GPU engine needs: triton, an NVIDIA card, a type that it computes, something to compute.

    Args:
        q: Any shape; only type, shape and device are looked at.
        k: Likewise.
        minimum: Compute capability from which on the kernels run.
        dtypes: Types of q that they take.
    """
    reasons = []
    if not _has_triton():
        reasons.append(Reason("triton", "the package triton is not installed", "pip install triton"))
    capability = device_capability(q)
    if capability is None:
        reasons.append(
            Reason("device", f"q is on {q.device.type!r}; an NVIDIA GPU is needed", "use engine='reference'")
        )
    elif capability < minimum:
        reasons.append(Reason("architecture", f"compute capability {capability}; at least {minimum} is needed"))
    if q.dtype not in dtypes:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reasons.append(Reason("dtype", f"q is {q.dtype}; supported: {supported}", "cast, or use engine='reference'"))
    if 0 in q.shape or 0 in k.shape:
        reasons.append(Reason("shape", "a tensor without elements", "use engine='reference'"))
    return reasons


def head_size_reasons(head_dim: int, largest: int) -> list[Reason]:
    """What Triton's matrix products need: head sizes in steps of 16 up to the largest that fits."""
    if head_dim % 16 == 0 and 16 <= head_dim <= largest:
        return []
    return [
        Reason(
            "head_size",
            f"head_dim={head_dim}; supported: multiples of 16 from 16 to {largest}",
            "pad the head, or use engine='reference'",
        )
    ]


REASONS = {"reference": reference_reasons, "triton": triton_reasons, "hopper": hopper_reasons, "fa4": fa4_reasons}


def is_supported(engine: str, request: KernelRequest) -> list[Reason]:
    """Why `engine` cannot serve `request`; an empty list if it can."""
    return REASONS[engine](request)


def pick_engine(
    name: str | None, engines: Sequence[str], order: Sequence[str], reasons: Callable[[str], list[Reason]]
) -> str:
    """Return the named engine, or the first of an order that serves the call.

    Args:
        name: Engine that was asked for; None or empty = none.
        engines: Every engine there is.
        order: Those that are taken without being named, the fastest first.
        reasons: Why an engine cannot serve the call; empty if it can.

    Raises:
        UnsupportedRequestError: The named engine is unknown or cannot serve the call, or none can; with every reason.
    """
    if name:
        if name not in engines:
            raise UnsupportedRequestError(f"engine={name!r} is not known; engines are {', '.join(engines)}.")
        found = reasons(name)
        if found:
            raise UnsupportedRequestError(
                f"engine {name!r} cannot run this call: " + "; ".join(map(str, found)) + ".", found
            )
        return name
    for candidate in order:
        if not reasons(candidate):
            return candidate
    found = reasons(order[-1])
    raise UnsupportedRequestError("no engine can run this call: " + "; ".join(map(str, found)) + ".", found)


def choose_engine(name: str | None, request: KernelRequest) -> str:
    """The named engine, or the first of the measured order that serves the call.

    Raises:
        UnsupportedRequestError: the named engine is unknown or cannot serve the call, with every reason.
    """
    return pick_engine(name, ENGINES, AUTOMATIC_ORDER, lambda engine: is_supported(engine, request))
