"""Attention in 8 bits without a CUDA build: the backends SAGE_ATTN and SAGE_SLA_ATTN.

The names below load on first use, so that reading the backends' specs (`attnmux_sage.plugin`) loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnmux_sage.backend import (
        SageAttentionBackend,
        SageAttentionImpl,
        SageSLAAttentionBackend,
        SageSLAAttentionImpl,
    )
    from attnmux_sage.ops import sage_attention

__all__ = [
    "SageAttentionBackend",
    "SageAttentionImpl",
    "SageSLAAttentionBackend",
    "SageSLAAttentionImpl",
    "sage_attention",
]

_HOMES = {
    "SageAttentionBackend": "backend",
    "SageAttentionImpl": "backend",
    "SageSLAAttentionBackend": "backend",
    "SageSLAAttentionImpl": "backend",
    "sage_attention": "ops",
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
