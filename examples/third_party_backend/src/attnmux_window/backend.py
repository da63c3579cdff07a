"""Glue between the operator and attnmux."""

from typing import Any

import torch

from attnmux import AttentionBackend, AttentionImpl, AttentionMetadata, DenseMetadataBuilder, UnsupportedRequestError
from attnmux_window.ops import window_attention


class WindowImpl(AttentionImpl[AttentionMetadata]):
    """Attention within `window` tokens to either side."""

    def __init__(self, *args: Any, window: int = 64, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.causal or self.num_heads != self.num_kv_heads:
            raise UnsupportedRequestError("WINDOW_ATTN is not causal and has as many key heads as query heads")
        self.window = window

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        return window_attention(query, key, value, window=self.window, softmax_scale=self.softmax_scale)


class WindowBackend(AttentionBackend):
    """Names the classes of the backend."""

    get_name = staticmethod(lambda: "WINDOW_ATTN")
    get_impl_cls = staticmethod(lambda: WindowImpl)
    get_metadata_cls = staticmethod(lambda: AttentionMetadata)
    get_builder_cls = staticmethod(lambda: DenseMetadataBuilder)
    get_supported_head_sizes = staticmethod(lambda: [*range(1, 1025)])

    @staticmethod
    def get_conformance_cls() -> Any:
        from attnmux_window.conformance import Conformance

        return Conformance
