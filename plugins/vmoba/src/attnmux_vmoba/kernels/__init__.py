"""Engines of the operator: which can serve a call, and why the others cannot.

Importing this module imports no triton; the kernels are imported when they first run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnmux.errors import UnsupportedRequestError
from attnmux.spec import Reason
from attnmux_blocksparse.kernels import KernelRequest as BlockSparseRequest
from attnmux_blocksparse.kernels import triton_reasons as block_sparse_reasons

if TYPE_CHECKING:
    import torch

    from attnmux_vmoba.prepare import ChunkGrid

__all__ = ["ENGINES", "MOST_CHUNKS", "KernelRequest", "choose_engine", "triton_reasons"]

ENGINES = ("reference", "triton")
"""What can compute the operator; None picks the last that serves a call."""

MOST_CHUNKS = 512
"""The gates of a query stay in registers while chunks are chosen."""


@dataclass(frozen=True)
class KernelRequest:
    """One call, as the engines judge it.

    q, k: `[B, S, H, D]` and `[B, S, H_kv, D]`; only types, shapes and devices are looked at. chunks: the chunks.
    """

    q: torch.Tensor
    k: torch.Tensor
    chunks: ChunkGrid


def triton_reasons(request: KernelRequest) -> list[Reason]:
    """Why the GPU engine cannot serve the call; empty if it can. Attention itself runs on the block-sparse operator."""
    q, k = request.q, request.k
    reasons = block_sparse_reasons(BlockSparseRequest(q, k, k, 128, 64, 1.0))
    if request.chunks.num_chunks > MOST_CHUNKS:
        reasons.append(
            Reason(
                "chunks",
                f"{request.chunks.num_chunks} chunks; at most {MOST_CHUNKS} are supported",
                "take larger chunks, or use engine='reference'",
            )
        )
    return reasons


def choose_engine(name: str | None, request: KernelRequest) -> str:
    """The named engine, or the fastest that serves the call.

    Raises:
        UnsupportedRequestError: The named engine is unknown or cannot serve the call, with every reason.
    """
    if name and name not in ENGINES:
        raise UnsupportedRequestError(f"engine={name!r} is not known; engines are {', '.join(ENGINES)}")
    if name == "reference":
        return name
    reasons = triton_reasons(request)
    if name and reasons:
        raise UnsupportedRequestError(f"engine {name!r} cannot run this call: " + "; ".join(map(str, reasons)), reasons)
    return "reference" if reasons else "triton"
