"""Sparse-Linear Attention as an attnmux backend.

The names below load on first use, so that reading the backend's spec (`attnmux_sla.plugin`) loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnmux_sla.backend import (
        SLAAttentionBackend,
        SLAAttentionImpl,
        SLAAttentionMetadata,
        SLAAttentionMetadataBuilder,
    )
    from attnmux_sla.ops import get_block_map, mean_pool, select_blocks, sparse_linear_attention
    from attnmux_sla.prepare import TopkRule
    from attnmux_sla.sla2 import AlphaMix, LearnedRouter

__all__ = [
    "AlphaMix",
    "LearnedRouter",
    "SLAAttentionBackend",
    "SLAAttentionImpl",
    "SLAAttentionMetadata",
    "SLAAttentionMetadataBuilder",
    "TopkRule",
    "get_block_map",
    "mean_pool",
    "select_blocks",
    "sparse_linear_attention",
]

_HOMES = {
    "AlphaMix": "sla2",
    "LearnedRouter": "sla2",
    "SLAAttentionBackend": "backend",
    "SLAAttentionImpl": "backend",
    "SLAAttentionMetadata": "backend",
    "SLAAttentionMetadataBuilder": "backend",
    "TopkRule": "prepare",
    "get_block_map": "ops",
    "mean_pool": "ops",
    "select_blocks": "ops",
    "sparse_linear_attention": "ops",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
