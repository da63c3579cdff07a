"""What the conformance suite of attnmux needs to know of this backend: its metadata, its oracle, its dense limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnmux.testing import BackendConformance, DenseLimit
from attnmux_vsa.backend import VideoSparseAttentionMetadata, VideoSparseAttentionMetadataBuilder
from attnmux_vsa.ops import video_sparse_attention

if TYPE_CHECKING:
    from attnmux.backend import AttentionMetadata

__all__ = ["VideoSparseAttentionConformance"]


class VideoSparseAttentionConformance(BackendConformance):
    """Holds VIDEO_SPARSE_ATTN to the reference in float64, and to dense attention where every tile is kept."""

    backend = "VIDEO_SPARSE_ATTN"
    # Several tiles, short ones among them.
    typical_length = 210

    def make_metadata(
        self, seq_len_q: int, seq_len_k: int, *, batch: int, device: torch.device
    ) -> VideoSparseAttentionMetadata:
        """Return a video of that many tokens, as near to a cube as its length allows, with a third of the tiles kept."""
        return _describe(seq_len_q, 0.67, device)

    def extra_inputs(self, q: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a gate with both signs."""
        generator = torch.Generator().manual_seed(q.shape[1])
        return {"gate_compress": torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q)}

    def oracle(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return the reference in the float64 of its inputs."""
        assert isinstance(metadata, VideoSparseAttentionMetadata)
        return video_sparse_attention(
            q,
            k,
            v,
            metadata,
            gate_compress=options.get("gate_compress"),
            softmax_scale=options["softmax_scale"],
            engine="reference",
        )

    def dense_limit(self, q: torch.Tensor, k: torch.Tensor) -> DenseLimit:
        """Return the call that keeps every tile and has no gate."""
        return DenseLimit(metadata=_describe(q.shape[1], 0.0, q.device))


def _describe(length: int, sparsity: float, device: torch.device) -> VideoSparseAttentionMetadata:
    """Return the metadata of a grid of `length` tokens."""
    frames = max(n for n in range(1, length + 1) if length % n == 0 and n**3 <= length)
    area = length // frames
    rows = max(n for n in range(1, area + 1) if area % n == 0 and n**2 <= area)
    return VideoSparseAttentionMetadataBuilder().build(
        0, (frames, rows, area // rows), (1, 1, 1), sparsity, device=device
    )
