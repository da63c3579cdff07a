"""Video Mixture-of-Block Attention as an attnmux backend.

The names below load on first use, so that reading the backend's spec (`attnmux_vmoba.plugin`) loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnmux_vmoba.backend import (
        VMOBAAttentionBackend,
        VMOBAAttentionImpl,
        VMOBAAttentionMetadata,
        VMOBAAttentionMetadataBuilder,
    )
    from attnmux_vmoba.ops import moba_attention, select_chunks
    from attnmux_vmoba.prepare import process_moba_input, process_moba_output

__all__ = [
    "VMOBAAttentionBackend",
    "VMOBAAttentionImpl",
    "VMOBAAttentionMetadata",
    "VMOBAAttentionMetadataBuilder",
    "moba_attention",
    "process_moba_input",
    "process_moba_output",
    "select_chunks",
]

_HOMES = {
    "VMOBAAttentionBackend": "backend",
    "VMOBAAttentionImpl": "backend",
    "VMOBAAttentionMetadata": "backend",
    "VMOBAAttentionMetadataBuilder": "backend",
    "moba_attention": "ops",
    "process_moba_input": "prepare",
    "process_moba_output": "prepare",
    "select_chunks": "ops",
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
