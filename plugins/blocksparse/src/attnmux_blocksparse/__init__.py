"""Block-sparse attention: softmax attention over a list of key blocks for every query block.

Importing this package loads neither torch nor triton; the names below load what they need on first use.
"""

from importlib import import_module

_HOMES = {
    "BlockIndex": "index",
    "BlockSparseAttentionBackend": "backend",
    "BlockSparseAttentionImpl": "backend",
    "BlockSparseAttentionMetadata": "backend",
    "BlockSparseAttentionMetadataBuilder": "backend",
    "TransposedLists": "index",
    "block_sparse_attention": "ops",
    "select_top_blocks": "ops",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
