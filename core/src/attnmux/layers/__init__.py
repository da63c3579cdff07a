"""Attention layers that a model author writes once."""

from attnmux.layers.local import LocalAttention

__all__ = ["LocalAttention"]
