"""Video Sparse Attention as an attnmux backend.

The names below load on first use, so that reading the backend's spec (`attnmux_vsa.plugin`) loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnmux_vsa.backend import (
        VideoSparseAttentionBackend,
        VideoSparseAttentionImpl,
        VideoSparseAttentionMetadata,
        VideoSparseAttentionMetadataBuilder,
    )
    from attnmux_vsa.ops import select_tiles, video_sparse_attention
    from attnmux_vsa.prepare import (
        VSA_TILE_SIZE,
        construct_variable_block_sizes,
        get_non_pad_index,
        get_reverse_tile_partition_indices,
        get_tile_partition_indices,
    )
    from attnmux_vsa.schedule import SparsitySchedule

__all__ = [
    "VSA_TILE_SIZE",
    "SparsitySchedule",
    "VideoSparseAttentionBackend",
    "VideoSparseAttentionImpl",
    "VideoSparseAttentionMetadata",
    "VideoSparseAttentionMetadataBuilder",
    "construct_variable_block_sizes",
    "get_non_pad_index",
    "get_reverse_tile_partition_indices",
    "get_tile_partition_indices",
    "select_tiles",
    "video_sparse_attention",
]

_HOMES = {
    "VSA_TILE_SIZE": "prepare",
    "SparsitySchedule": "schedule",
    "VideoSparseAttentionBackend": "backend",
    "VideoSparseAttentionImpl": "backend",
    "VideoSparseAttentionMetadata": "backend",
    "VideoSparseAttentionMetadataBuilder": "backend",
    "construct_variable_block_sizes": "prepare",
    "get_non_pad_index": "prepare",
    "get_reverse_tile_partition_indices": "prepare",
    "get_tile_partition_indices": "prepare",
    "select_tiles": "ops",
    "video_sparse_attention": "ops",
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
