"""Engines of the block-sparse operator: which can serve a call, and why the others cannot.

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
    from collections.abc import Callable

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
    """What every GPU engine needs."""
    return gpu_reasons(request.q, minimum) + empty_reasons(request.q, request.k)


def gpu_reasons(
    q: torch.Tensor,
    minimum: tuple[int, int],
    *,
    dtypes: tuple[torch.dtype, ...] = HALF_TYPES,
    on_older_cards: str = "use engine='reference'",
) -> list[Reason]:
    """Return why Triton kernels cannot serve q: no triton, no NVIDIA card, an older one, another type.

    Args:
        q: Of which the type and the device are looked at.
        minimum: Compute capability that the kernels need.
        dtypes: Types that they take.
        on_older_cards: What to do where the card is older.
    """
    reasons = []
    if find_spec("triton") is None:
        reasons.append(Reason("triton", "the package triton is not installed", "pip install triton"))
    capability = device_capability(q)
    if capability is None:
        reasons.append(
            Reason("device", f"q is on {q.device.type!r}; an NVIDIA GPU is needed", "use engine='reference'")
        )
    elif capability < minimum:
        needed = f"compute capability {capability}; at least {minimum} is needed"
        reasons.append(Reason("architecture", needed, on_older_cards))
    if q.dtype not in dtypes:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reasons.append(Reason("dtype", f"q is {q.dtype}; supported: {supported}", "cast, or use engine='reference'"))
    return reasons


def empty_reasons(*tensors: torch.Tensor) -> list[Reason]:
    """Return that there is nothing to compute, if a tensor has no elements."""
    if all(0 not in x.shape for x in tensors):
        return []
    return [Reason("shape", "a tensor without elements", "use engine='reference'")]


REASONS = {"reference": reference_reasons, "triton": triton_reasons, "hopper": hopper_reasons, "fa4": fa4_reasons}


def is_supported(engine: str, request: KernelRequest) -> list[Reason]:
    """Why `engine` cannot serve `request`; an empty list if it can."""
    return REASONS[engine](request)


def choose(
    name: str | None, order: tuple[str, ...], engines: tuple[str, ...], reasons_of: Callable[[str], list[Reason]]
) -> str | None:
    """Return the named engine, or without a name the first that serves the call; None if none does.

    Args:
        name: What was asked for; None or empty for any.
        order: Engines to choose from, the fastest first.
        engines: Those that may be named.
        reasons_of: Gives why an engine cannot serve the call, nothing if it can.

    Raises:
        UnsupportedRequestError: The named engine is unknown or cannot serve the call, with every reason.
    """
    if not name:
        for engine in order:
            if not reasons_of(engine):
                return engine
        return None
    if name not in engines:
        raise UnsupportedRequestError(f"engine={name!r} is not known; engines are {', '.join(engines)}")
    reasons = reasons_of(name)
    if reasons:
        listed = "; ".join(map(str, reasons))
        raise UnsupportedRequestError(f"engine {name!r} cannot run this call: {listed}.", reasons)
    return name


def choose_engine(name: str | None, request: KernelRequest) -> str:
    """Return the named engine, or the first of the measured order that serves the call.

    Raises:
        UnsupportedRequestError: See `choose`; or no engine takes the type.
    """
    engine = choose(name, AUTOMATIC_ORDER, ENGINES, lambda engine: is_supported(engine, request))
    if engine is None:
        raise UnsupportedRequestError(f"no engine takes q of type {request.q.dtype}.", reference_reasons(request))
    return engine
