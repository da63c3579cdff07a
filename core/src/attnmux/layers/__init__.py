"""Attention layers that a model author writes once."""

from attnmux.layers.distributed import DistributedAttention, DistributedAttention_VSA
from attnmux.layers.local import LocalAttention

__all__ = ["DistributedAttention", "DistributedAttention_VSA", "LocalAttention"]
