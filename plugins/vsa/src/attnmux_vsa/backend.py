"""The classes of the backend VIDEO_SPARSE_ATTN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from attnmux.errors import UnsupportedRequestError
from attnmux_vsa.ops import check_metadata, video_sparse_attention
from attnmux_vsa.prepare import VSA_TILE_SIZE, VideoTiling, build_video_tiling, token_grid

if TYPE_CHECKING:
    import torch

    from attnmux.spec import AttentionRequest
    from attnmux_vsa.conformance import VideoSparseAttentionConformance

__all__ = [
    "VideoSparseAttentionBackend",
    "VideoSparseAttentionImpl",
    "VideoSparseAttentionMetadata",
    "VideoSparseAttentionMetadataBuilder",
]


@dataclass
class VideoSparseAttentionMetadata(VideoTiling, AttentionMetadata):
    """The step, the grid of the video cut into tiles, and the number of tiles to keep.

    `current_timestep` comes first; the other fields are those of `VideoTiling`. Attention does not read the step.
    """


class VideoSparseAttentionMetadataBuilder(AttentionMetadataBuilder[VideoSparseAttentionMetadata]):
    """Builds the metadata from a latent video's shape."""

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        """Do nothing: no batch leaves anything behind, and the tables of a grid stay valid."""

    def build(  # type: ignore[override]  # the contract names the arguments
        self,
        current_timestep: int,
        raw_latent_shape: tuple[int, int, int],
        patch_size: tuple[int, int, int],
        VSA_sparsity: float | None = None,
        device: torch.device | str = "cpu",
        *,
        topk: int | None = None,
        tile_size: tuple[int, int, int] = VSA_TILE_SIZE,
        **unknown: Any,
    ) -> VideoSparseAttentionMetadata:
        """Return the metadata for one forward pass; the tables of a grid are shared between calls.

        Args:
            current_timestep: Index of the denoising step, from 0.
            raw_latent_shape: Latent frames, rows and columns (T, H, W), without batch and channels, each >= 1.
            patch_size: Latent frames, rows and columns of one token, each >= 1.
            VSA_sparsity: Fraction of key tiles left out, in [0, 1]; `prepare.count_kept_tiles` has the formula.
            device: Where the index tables live: the device of q, k and v.
            topk: Key tiles kept per query tile, in [1, N]; instead of `VSA_sparsity`.
            tile_size: Tokens of a tile along T, H and W.
            **unknown: None; each is refused by name.

        Raises:
            UnsupportedRequestError: The patch does not divide the latent; a number is out of its range; neither or
                both of `VSA_sparsity` and `topk` are given; an argument is unknown.
        """
        if unknown:
            raise UnsupportedRequestError(
                f"{type(self).__name__}.build does not know the argument {', '.join(sorted(unknown))}; it takes "
                "current_timestep, raw_latent_shape, patch_size, VSA_sparsity, device, topk and tile_size"
            )
        tiling = build_video_tiling(
            token_grid(raw_latent_shape, patch_size),
            sparsity=VSA_sparsity,
            topk=topk,
            tile_size=tile_size,
            device=device,
        )
        return VideoSparseAttentionMetadata(current_timestep=current_timestep, **vars(tiling))


class VideoSparseAttentionImpl(AttentionImpl[VideoSparseAttentionMetadata]):
    """Video Sparse Attention of one layer.

    Tokens come and go in raster order: tiling happens inside `forward`, so `preprocess_qkv` and `postprocess_output`
    are the identity. Arguments are those of `AttentionImpl`.

    Raises:
        UnsupportedRequestError: `causal` is set, or an argument is unknown or out of its range.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra_impl_args)
        if causal:
            raise UnsupportedRequestError(
                "VIDEO_SPARSE_ATTN cannot run causal=True: tiles reach over several frames and every token of a kept "
                "tile is attended; use TORCH_SDPA or FLASH_ATTN for a causal layer"
            )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: VideoSparseAttentionMetadata | None,
        *,
        gate_compress: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention output `[B, S, H, D]`, raster order, in the dtype of `query`.

        Args:
            query: `[B, S, H, D]` in raster order, S = T * H * W of the metadata's grid, any strides; not modified.
            key: `[B, S, H_kv, D]`, likewise.
            value: `[B, S, H_kv, D]`, likewise.
            attn_metadata: The grid and the number of tiles to keep.
            gate_compress: `[B, S, H, D]`, factor on the coarse branch, not passed through any activation; None leaves
                the coarse branch out.

        Raises:
            ForwardContextError: There is no metadata.
            UnsupportedRequestError: See `video_sparse_attention`.
        """
        check_metadata(attn_metadata)
        if query.shape[-1] != self.head_size:
            raise UnsupportedRequestError(
                f"query has head_dim={query.shape[-1]}, but this layer was built with head_size={self.head_size}"
            )
        return video_sparse_attention(
            query, key, value, attn_metadata, gate_compress=gate_compress, softmax_scale=self.softmax_scale
        )


class VideoSparseAttentionBackend(AttentionBackend):
    """Names the classes of VIDEO_SPARSE_ATTN."""

    @staticmethod
    def get_name() -> str:
        """Return the backend's name."""
        return "VIDEO_SPARSE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[VideoSparseAttentionImpl]:
        """Return the class of one layer's attention."""
        return VideoSparseAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[VideoSparseAttentionMetadata]:
        """Return the class of the metadata."""
        return VideoSparseAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[VideoSparseAttentionMetadataBuilder]:
        """Return the class that builds the metadata."""
        return VideoSparseAttentionMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return an empty list: every head size that the capabilities declare."""
        return []

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return what runs the request: the reference, whatever is asked."""
        return "reference, plain PyTorch"

    @staticmethod
    def get_conformance_cls() -> type[VideoSparseAttentionConformance]:
        """Return what `attnmux check VIDEO_SPARSE_ATTN` runs; needs pytest."""
        from attnmux_vsa.conformance import VideoSparseAttentionConformance

        return VideoSparseAttentionConformance
