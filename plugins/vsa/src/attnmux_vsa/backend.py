"""The classes of the backend VIDEO_SPARSE_ATTN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnmux.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    LayerPlace,
    layer_index,
)
from attnmux.backends.sdpa import SDPAImpl
from attnmux.errors import UnsupportedRequestError
from attnmux_vsa.ops import check_call, check_conform, check_metadata, video_sparse_attention
from attnmux_vsa.prepare import VSA_TILE_SIZE, VideoTiling, build_video_tiling, token_grid
from attnmux_vsa.schedule import SparsitySchedule

if TYPE_CHECKING:
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
        VSA_sparsity: float | SparsitySchedule | None = None,
        device: torch.device | str = "cpu",
        *,
        topk: int | None = None,
        tile_size: tuple[int, int, int] = VSA_TILE_SIZE,
        tile_policy: str = "grid",
        **unknown: Any,
    ) -> VideoSparseAttentionMetadata:
        """Return the metadata for one forward pass; the tables of a grid are shared between calls.

        Args:
            current_timestep: Index of the denoising step, from 0.
            raw_latent_shape: Latent frames, rows and columns (T, H, W), without batch and channels, each >= 1.
            patch_size: Latent frames, rows and columns of one token, each >= 1.
            VSA_sparsity: Fraction of key tiles left out, in [0, 1]; `prepare.count_kept_tiles` has the formula. A
                `SparsitySchedule` gives that of the step, and the layers that keep every tile.
            device: Where the index tables live: the device of q, k and v.
            topk: Key tiles kept per query tile, in [1, N]; instead of `VSA_sparsity`.
            tile_size: Tokens of a tile along T, H and W.
            tile_policy: "grid" or "adaptive"; see `prepare.build_video_tiling`.
            **unknown: None; each is refused by name.

        Raises:
            UnsupportedRequestError: The patch does not divide the latent; a number is out of its range; neither or
                both of `VSA_sparsity` and `topk` are given; an argument is unknown.
        """
        if unknown:
            raise UnsupportedRequestError(
                f"{type(self).__name__}.build does not know the argument {', '.join(sorted(unknown))}; it takes "
                "current_timestep, raw_latent_shape, patch_size, VSA_sparsity, device, topk, tile_size and tile_policy"
            )
        schedule = VSA_sparsity if isinstance(VSA_sparsity, SparsitySchedule) else None
        tiling = build_video_tiling(
            token_grid(raw_latent_shape, patch_size),
            sparsity=VSA_sparsity if schedule is None else schedule.at(current_timestep),  # type: ignore[arg-type]
            topk=topk,
            tile_size=tile_size,
            device=device,
            tile_policy=tile_policy,
        )
        if schedule is not None:
            tiling.dense_layers = schedule.dense_layers
        return VideoSparseAttentionMetadata(current_timestep=current_timestep, **vars(tiling))


class VideoSparseAttentionImpl(AttentionImpl[VideoSparseAttentionMetadata]):
    """Video Sparse Attention of one layer.

    Tokens come and go in raster order: tiling happens inside `forward`, so `preprocess_qkv` and `postprocess_output`
    are the identity. A call that keeps every tile and has no gate is dense attention and runs as TORCH_SDPA does.

    Args:
        num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix: As for `AttentionImpl`. The first number after
            "blocks." in the prefix is the layer's index, which a schedule's dense layers go by.
        layer_idx: The layer's index, >= 0, instead of the prefix's.
        conform: None or "bf16-scores"; see `video_sparse_attention`.
        **extra_impl_args: None; each is refused by name.

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
        *,
        layer_idx: int | None = None,
        conform: str | None = None,
        **extra_impl_args: Any,
    ) -> None:
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra_impl_args)
        if causal:
            raise UnsupportedRequestError(
                "VIDEO_SPARSE_ATTN cannot run causal=True: tiles reach over several frames and every token of a kept "
                "tile is attended; use TORCH_SDPA or FLASH_ATTN for a causal layer"
            )
        self.layer_idx = layer_index(prefix, layer_idx)
        self._place = LayerPlace(self.layer_idx)
        self.conform = check_conform(conform)
        self._dense = SDPAImpl(num_heads, head_size, softmax_scale, num_kv_heads=num_kv_heads)

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
        tiling = check_metadata(attn_metadata)
        if query.shape[-1] != self.head_size:
            raise UnsupportedRequestError(
                f"query has head_dim={query.shape[-1]}, but this layer was built with head_size={self.head_size}"
            )
        topk = tiling.topk
        if tiling.dense_layers:
            if not self._place.is_known:
                raise UnsupportedRequestError(
                    f"the metadata keep layers {tiling.dense_layers} dense, but this layer does not know its index; give it "
                    'a prefix with "blocks.<i>", or layer_idx='
                )
            for layer in tiling.dense_layers:
                if self._place.is_within(layer, layer):
                    topk = tiling.variable_block_sizes.shape[0]
        if gate_compress is None and topk == tiling.variable_block_sizes.shape[0]:
            check_call(query, key, tiling, v=value)
            dense = self._dense.forward(query, key, value, None)
            assert isinstance(dense, torch.Tensor)
            return dense
        return video_sparse_attention(
            query,
            key,
            value,
            tiling,
            topk=topk,
            gate_compress=gate_compress,
            softmax_scale=self.softmax_scale,
            conform=self.conform,
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
        """Return what runs the request."""
        if request.device_type == "cuda" and request.dtype in ("float16", "bfloat16") and request.head_size % 16 == 0:
            return "Triton kernels around the block-sparse operator; plain PyTorch where tiles have another size than 64, 128, 256"
        return "reference, plain PyTorch"

    @staticmethod
    def get_conformance_cls() -> type[VideoSparseAttentionConformance]:
        """Return what `attnmux check VIDEO_SPARSE_ATTN` runs; needs pytest."""
        from attnmux_vsa.conformance import VideoSparseAttentionConformance

        return VideoSparseAttentionConformance
