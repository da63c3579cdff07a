"""NO_ATTENTION: a layer that is built without any kernel, for models that probe what exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata, DenseMetadataBuilder
from attnmux.errors import UnsupportedRequestError

if TYPE_CHECKING:
    import torch

__all__ = ["NoAttentionBackend", "NoAttentionImpl"]


class NoAttentionImpl(AttentionImpl[AttentionMetadata]):
    """Takes any constructor argument of the contract and refuses to run."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None,
        **extra_inputs: Any,
    ) -> torch.Tensor:
        """Raise UnsupportedRequestError, whatever is passed."""
        raise UnsupportedRequestError(
            "this layer was built with NO_ATTENTION and has no kernel; build it with another backend to run it"
        )


class NoAttentionBackend(AttentionBackend):
    """The backend that computes nothing."""

    @staticmethod
    def get_name() -> str:
        """Return "NO_ATTENTION"."""
        return "NO_ATTENTION"

    @staticmethod
    def get_impl_cls() -> type[NoAttentionImpl]:
        """Return NoAttentionImpl."""
        return NoAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """Return AttentionMetadata: nothing is needed."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[DenseMetadataBuilder]:
        """Return the builder of the bare metadata."""
        return DenseMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return an empty list: any."""
        return []
