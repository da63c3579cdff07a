"""Classes that dense backends share: metadata that nobody needs, and its builder."""

from __future__ import annotations

from typing import Any

from attnmux.backend import AttentionMetadata, AttentionMetadataBuilder
from attnmux.errors import UnsupportedRequestError

__all__ = ["DenseMetadataBuilder"]


class DenseMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    """Builds metadata that holds the timestep only; dense attention needs none."""

    def __init__(self) -> None:
        """Nothing to keep."""

    def prepare(self) -> None:
        """Nothing to reset."""

    def build(self, *, current_timestep: int = 0, **kwargs: Any) -> AttentionMetadata:
        """Return the metadata of one forward pass.

        Args:
            current_timestep: Index of the denoising step, from 0.
            **kwargs: None is known.

        Raises:
            UnsupportedRequestError: An argument that dense attention has no use for; names it.
        """
        if kwargs:
            raise UnsupportedRequestError(
                f"dense attention has no use for {', '.join(sorted(kwargs))}; remove it, or choose the backend it belongs to"
            )
        return AttentionMetadata(current_timestep=current_timestep)
