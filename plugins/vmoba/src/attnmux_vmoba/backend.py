"""The classes of the backend VMOBA_ATTN."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, layer_index
from attnmux.backends.sdpa import SDPAImpl
from attnmux.errors import ForwardContextError, UnsupportedRequestError
from attnmux_vmoba.kernels import ENGINES
from attnmux_vmoba.ops import attend_chunks, check_tensors
from attnmux_vmoba.prepare import (
    COUPLES_HEADS,
    ChunkGrid,
    ChunkSize,
    Selection,
    check_selection,
    checked_sizes,
    resolve_chunks,
    token_grid,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from attnmux.spec import AttentionRequest
    from attnmux_vmoba.conformance import VMOBAAttentionConformance

__all__ = ["VMOBAAttentionBackend", "VMOBAAttentionImpl", "VMOBAAttentionMetadata", "VMOBAAttentionMetadataBuilder"]

KINDS = ("temporal", "spatial", "st")
"""Kinds of layers, in the order of their cycle."""

# what `_turns` tabulates; beyond, a compiled model has a graph for every layer
_LONGEST_CYCLE = 12
_MOST_FULL_LAYERS = 32


@dataclass(kw_only=True)
class VMOBAAttentionMetadata(AttentionMetadata):
    """The step, the grid of the video, its chunks for each kind of layer, and how chunks are chosen.

    Layers from `first_full_layer` on take turns: `temporal_layer` layers with 1-D chunks, `spatial_layer` with 2-D and
    `st_layer` with 3-D ones, and again. Layers before it are dense, and so are all layers in steps before `first_full_step`.

    Attributes:
        current_timestep: Index of the denoising step, from 0.
        patch_resolution: Tokens along T, H and W.
        temporal_chunk_size: Frames of a 1-D chunk, > 0, may be a fraction.
        temporal_topk: Chunks per query, its own included, >= 1; more than there are keeps all.
        spatial_chunk_size: (h, w) tokens of a 2-D chunk; they divide H and W.
        spatial_topk: As above.
        st_chunk_size: (t, h, w) tokens of a 3-D chunk; they divide T, H and W.
        st_topk: As above.
        temporal_layer: Layers with 1-D chunks per cycle, >= 0.
        spatial_layer: Layers with 2-D chunks per cycle, >= 0.
        st_layer: Layers with 3-D chunks per cycle, >= 0. Chunk sizes of a kind without layers are not looked at.
        moba_select_mode: "topk" or "threshold".
        moba_threshold: Share of the normalised gates that mode "threshold" keeps, in [0, 1].
        moba_threshold_type: Scope in either mode: "query_head", "head_global", "overall", for thresholds also "block".
        first_full_step: Steps that are dense, >= 0.
        first_full_layer: Layers that are dense, >= 0.
        topk1_is_dense: Published quirk: a top-k of 1 is dense attention instead of the own chunk alone.
        threshold_keeps_one: Published quirk: a threshold that the own chunks meet alone still keeps one more entry.

    Raises:
        UnsupportedRequestError: A field is out of its range, or a chunk does not divide its axis; names both.
    """

    patch_resolution: tuple[int, int, int]
    temporal_chunk_size: int | float
    temporal_topk: int
    spatial_chunk_size: Sequence[int]
    spatial_topk: int
    st_chunk_size: Sequence[int]
    st_topk: int
    temporal_layer: int = 1
    spatial_layer: int = 1
    st_layer: int = 1
    moba_select_mode: str = "topk"
    moba_threshold: float = 0.25
    moba_threshold_type: str = "query_head"
    first_full_step: int = 0
    first_full_layer: int = 0
    topk1_is_dense: bool = False
    threshold_keeps_one: bool = False
    # chunks by kind; None for a kind without layers
    chunks: tuple[ChunkGrid | None, ...] = field(init=False, repr=False)
    # torch.compile guards on what a layer reads, so that a claim about the step makes two graphs where the step makes many
    is_full_step: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.patch_resolution = checked_sizes("patch_resolution", self.patch_resolution, 3)
        cycle = (self.temporal_layer, self.spatial_layer, self.st_layer)
        numbers = dict(zip(("temporal_layer", "spatial_layer", "st_layer"), cycle, strict=True))
        numbers |= {"first_full_step": self.first_full_step, "first_full_layer": self.first_full_layer}
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UnsupportedRequestError(f"{name}={value!r} must be an integer >= 0")
        if not sum(cycle):
            raise UnsupportedRequestError(
                "temporal_layer, spatial_layer and st_layer are all 0: no layer has chunks; use TORCH_SDPA for dense attention"
            )
        sizes: tuple[ChunkSize, ...] = (
            self.temporal_chunk_size,
            tuple(self.spatial_chunk_size),
            tuple(self.st_chunk_size),
        )
        for name, size, count in zip(("spatial_chunk_size", "st_chunk_size"), sizes[1:], (2, 3), strict=True):
            checked_sizes(name, size, count)
        for topk in (self.temporal_topk, self.spatial_topk, self.st_topk):
            check_selection(self.moba_select_mode, self.moba_threshold_type, topk, self.moba_threshold)
        self.is_full_step = self.current_timestep < self.first_full_step
        self.chunks = tuple(
            resolve_chunks(self.patch_resolution, size) if layers else None
            for size, layers in zip(sizes, cycle, strict=True)
        )

    def kind_of_layer(self, layer_idx: int) -> int | None:
        """Return the index in `KINDS` of what a layer attends to at this step; None where it is dense."""
        place = layer_idx - self.first_full_layer
        return self.kind_of_turn(place if place < 0 else place % self.cycle)

    @property
    def cycle(self) -> int:
        """After how many layers the kinds of chunks begin again."""
        return self.temporal_layer + self.spatial_layer + self.st_layer

    def kind_of_turn(self, turn: int) -> int | None:
        """Return the same by the layer's place in its cycle, from 0; negative before the first cycle."""
        if turn < 0 or self.is_full_step:
            return None
        if turn < self.temporal_layer:
            return 0
        return 1 if turn < self.temporal_layer + self.spatial_layer else 2

    def selection(self, kind: int) -> Selection:
        """Return how a layer of this kind chooses its chunks."""
        topk = (self.temporal_topk, self.spatial_topk, self.st_topk)[kind]
        return Selection(
            self.moba_select_mode, self.moba_threshold_type, topk, self.moba_threshold, self.threshold_keeps_one
        )


class VMOBAAttentionMetadataBuilder(AttentionMetadataBuilder[VMOBAAttentionMetadata]):
    """Builds the metadata from a latent video's shape."""

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        """Do nothing: no batch leaves anything behind."""

    def build(  # type: ignore[override]  # the contract names the arguments
        self,
        current_timestep: int,
        raw_latent_shape: Sequence[int],
        patch_size: Sequence[int],
        temporal_chunk_size: float | None = None,
        temporal_topk: int | None = None,
        spatial_chunk_size: Sequence[int] | None = None,
        spatial_topk: int | None = None,
        st_chunk_size: Sequence[int] | None = None,
        st_topk: int | None = None,
        moba_select_mode: str = "topk",
        moba_threshold: float = 0.25,
        moba_threshold_type: str = "query_head",
        device: torch.device | str | None = None,
        first_full_layer: int = 0,
        first_full_step: int = 0,
        temporal_layer: int = 1,
        spatial_layer: int = 1,
        st_layer: int = 1,
        *,
        topk_ratio: float = 0.25,
        topk1_is_dense: bool = False,
        threshold_keeps_one: bool = False,
        **unknown: Any,
    ) -> VMOBAAttentionMetadata:
        """Return the metadata for one forward pass.

        Args:
            current_timestep: Index of the denoising step, from 0.
            raw_latent_shape: Latent frames, rows and columns (T, H, W), without batch and channels, each >= 1.
            patch_size: Latent frames, rows and columns of one token, each >= 1.
            temporal_chunk_size: See the metadata; None = a fifth of the frames, rounded down, at least one.
            temporal_topk: See the metadata; None = by `topk_ratio`.
            spatial_chunk_size: See the metadata; None = divisors next to a quarter of H and W.
            spatial_topk: As `temporal_topk`.
            st_chunk_size: See the metadata; None = divisors next to a fifth of T and a quarter of H and W.
            st_topk: As `temporal_topk`.
            moba_select_mode: See the metadata.
            moba_threshold: See the metadata.
            moba_threshold_type: See the metadata.
            device: Not used: the metadata hold no tensor. Pipelines pass it.
            first_full_layer: See the metadata.
            first_full_step: See the metadata.
            temporal_layer: See the metadata.
            spatial_layer: See the metadata.
            st_layer: See the metadata.
            topk_ratio: Fraction of the chunks that a query attends to where a top-k is not given, in (0, 1]; rounded up, and
                at least one besides its own.
            topk1_is_dense: See the metadata.
            threshold_keeps_one: See the metadata.
            **unknown: None; each is refused by name.

        Raises:
            UnsupportedRequestError: The patch does not divide the latent, a chunk does not divide its axis, a number is out
                of its range, or an argument is unknown.
        """
        if unknown:
            raise UnsupportedRequestError(
                f"{type(self).__name__}.build does not know the argument {', '.join(sorted(unknown))}; "
                "VMOBAAttentionMetadata lists its own"
            )
        if not 0.0 < topk_ratio <= 1.0:
            raise UnsupportedRequestError(
                f"topk_ratio={topk_ratio!r} is a fraction of the chunks and must lie in (0, 1]"
            )
        grid = token_grid(raw_latent_shape, patch_size)
        box = (
            _divisor_near(grid[0], grid[0] / 5),
            _divisor_near(grid[1], grid[1] / 4),
            _divisor_near(grid[2], grid[2] / 4),
        )
        sizes: list[Any] = [
            max(1, grid[0] // 5) if temporal_chunk_size is None else temporal_chunk_size,
            box[1:] if spatial_chunk_size is None else spatial_chunk_size,
            box if st_chunk_size is None else st_chunk_size,
        ]
        layers = (temporal_layer, spatial_layer, st_layer)
        topk = [
            _kept_by_ratio(grid, size, topk_ratio) if given is None and count else given or 1
            for size, given, count in zip(sizes, (temporal_topk, spatial_topk, st_topk), layers, strict=True)
        ]
        return VMOBAAttentionMetadata(
            current_timestep=current_timestep,
            patch_resolution=grid,
            temporal_chunk_size=sizes[0],
            temporal_topk=topk[0],
            spatial_chunk_size=sizes[1],
            spatial_topk=topk[1],
            st_chunk_size=sizes[2],
            st_topk=topk[2],
            temporal_layer=temporal_layer,
            spatial_layer=spatial_layer,
            st_layer=st_layer,
            moba_select_mode=moba_select_mode,
            moba_threshold=moba_threshold,
            moba_threshold_type=moba_threshold_type,
            first_full_step=first_full_step,
            first_full_layer=first_full_layer,
            topk1_is_dense=topk1_is_dense,
            threshold_keeps_one=threshold_keeps_one,
        )


def _divisor_near(size: int, wanted: float) -> int:
    """The divisor of `size` next to `wanted`, the smaller one of two."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))


def _kept_by_ratio(grid: tuple[int, int, int], chunk_size: ChunkSize, ratio: float) -> int:
    """Chunks that a fraction of them means: rounded up, at least two where there are two."""
    chunks = resolve_chunks(grid, chunk_size).num_chunks
    # 0.1 * 30 is a little more than 3
    return min(chunks, max(2, math.ceil(ratio * chunks - 1e-6)))


class VMOBAAttentionImpl(AttentionImpl[VMOBAAttentionMetadata]):
    """Video Mixture-of-Block Attention of one layer.

    Tokens come and go in raster order: reordering happens inside `forward`, so `preprocess_qkv` and `postprocess_output`
    are the identity.

    Args:
        num_heads: Query heads, >= 1.
        head_size: Channels of one head, >= 1.
        softmax_scale: Factor on the scores; None = `head_size ** -0.5`.
        causal: Must be False.
        num_kv_heads: Key and value heads; None = `num_heads`. Every query head chooses its own chunks.
        prefix: Name of the layer in its model; `blocks.<i>` in it gives the layer's index.
        layer_idx: Index of the layer, from 0, instead. Without a prefix the layer counts as layer 0.
        engine: One of the operator's engines; None takes the fastest that serves a call.
        **extra_impl_args: None; each is refused by name.

    Raises:
        UnsupportedRequestError: `causal` is set, the prefix names no layer, or an argument is unknown or out of its range.
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
        engine: str | None = None,
        **extra_impl_args: Any,
    ) -> None:
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra_impl_args)
        if causal:
            raise UnsupportedRequestError(
                "VMOBA_ATTN cannot run causal=True: a chunk reaches over several frames and every token of a kept chunk is "
                "attended; use TORCH_SDPA or FLASH_ATTN for a causal layer"
            )
        if engine is not None and engine not in ENGINES:
            raise UnsupportedRequestError(f"engine={engine!r} is not known; engines are {', '.join(ENGINES)}")
        self.layer_idx = _layer_index(prefix, layer_idx)
        self._turns = _turns(self.layer_idx)
        self.engine = engine
        self._dense = SDPAImpl(num_heads, head_size, self.softmax_scale, False, num_kv_heads, prefix)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: VMOBAAttentionMetadata | None,
    ) -> torch.Tensor:
        """Return the attention output `[B, S, H, D]`, raster order, in the dtype of `query`.

        Args:
            query: `[B, S, H, D]` in raster order, S = T * H * W of the metadata's grid, D contiguous; not modified.
            key: `[B, S, H_kv, D]`, likewise.
            value: `[B, S, H_kv, D]`, likewise.
            attn_metadata: The step, the chunks and how they are chosen.

        Raises:
            ForwardContextError: There is no metadata.
            UnsupportedRequestError: See `moba_attention`; or the scope couples heads, and this call has a part of them.
        """
        if attn_metadata is None:
            raise ForwardContextError(
                "VMOBA_ATTN needs the grid of the video and got no metadata; build it with VMOBAAttentionMetadataBuilder()"
                ".build(current_timestep, raw_latent_shape, patch_size, ...) and pass it as attn_metadata=, or run under "
                "attnmux.set_forward_context(attn_metadata=...)"
            )
        if not isinstance(attn_metadata, VMOBAAttentionMetadata):
            raise UnsupportedRequestError(
                f"VMOBA_ATTN needs VMOBAAttentionMetadata, got {type(attn_metadata).__name__}; build it with "
                "VMOBAAttentionMetadataBuilder"
            )
        if query.shape[-1] != self.head_size:
            raise UnsupportedRequestError(
                f"query has head_dim={query.shape[-1]}, but this layer was built with head_size={self.head_size}"
            )
        scope = attn_metadata.moba_threshold_type
        if scope in COUPLES_HEADS and query.shape[2] != self.total_num_heads:
            raise UnsupportedRequestError(
                f"query has {query.shape[2]} of the layer's {self.total_num_heads} heads, and moba_threshold_type={scope!r} "
                "shares one budget among all heads: under sequence parallelism its result would depend on the number of ranks; use "
                "'query_head' or 'head_global'"
            )
        cycle, first = attn_metadata.cycle, attn_metadata.first_full_layer
        if cycle <= _LONGEST_CYCLE and first < _MOST_FULL_LAYERS:
            kind = attn_metadata.kind_of_turn(self._turns[cycle - 1][first])
        else:
            kind = attn_metadata.kind_of_layer(self.layer_idx)
        how = attn_metadata.selection(kind or 0)
        if kind is None or (attn_metadata.topk1_is_dense and how.mode == "topk" and how.topk == 1):
            T, H, W = attn_metadata.patch_resolution
            check_tensors(query, key, value, ChunkGrid((T, H, W), (T, H, W)))
            out = self._dense.forward(query, key, value)
            assert not isinstance(out, tuple)
            return out
        chunks = attn_metadata.chunks[kind]
        assert chunks is not None
        return attend_chunks(query, key, value, chunks, how, softmax_scale=self.softmax_scale, engine=self.engine)


def _layer_index(prefix: str, layer_idx: int | None) -> int:
    index = layer_index(prefix, layer_idx)
    if index is None and prefix:
        raise UnsupportedRequestError(
            f"prefix={prefix!r} names no layer as blocks.<i>, and VMOBA_ATTN chooses its kind of chunk by the layer's index; "
            "pass layer_idx="
        )
    return index or 0


def _turns(layer_idx: int) -> list[list[int]]:
    """Return a layer's place in its cycle by the cycle's length and the number of full layers; -1 for a full layer.

    torch.compile guards on the entry of a list that is read (of tuples, on the whole), so that layers at one place of their
    cycles share a graph; arithmetic on the index would make one for each layer, and a model has more of those than torch
    compiles.
    """
    return [
        [(layer_idx - first) % cycle if first <= layer_idx else -1 for first in range(_MOST_FULL_LAYERS)]
        for cycle in range(1, _LONGEST_CYCLE + 1)
    ]


class VMOBAAttentionBackend(AttentionBackend):
    """Names the classes of VMOBA_ATTN."""

    @staticmethod
    def get_name() -> str:
        """Return the backend's name."""
        return "VMOBA_ATTN"

    @staticmethod
    def get_impl_cls() -> type[VMOBAAttentionImpl]:
        """Return the class of one layer's attention."""
        return VMOBAAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[VMOBAAttentionMetadata]:
        """Return the class of the metadata."""
        return VMOBAAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[VMOBAAttentionMetadataBuilder]:
        """Return the class that builds the metadata."""
        return VMOBAAttentionMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return an empty list: every head size that the capabilities declare."""
        return []

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return what runs the request, and why."""
        if request.device_type != "cuda":
            return "reference, plain PyTorch"
        if request.dtype not in ("bfloat16", "float16"):
            return f"reference, plain PyTorch (the kernels compute in half precision, not {request.dtype})"
        if request.head_size % 16 or not 16 <= request.head_size <= 256:
            return f"reference, plain PyTorch (the kernels take head sizes 16 to 256 in steps of 16, not {request.head_size})"
        return "triton, large chunks on the block-sparse operator"

    @staticmethod
    def get_conformance_cls() -> type[VMOBAAttentionConformance]:
        """Return what `attnmux check VMOBA_ATTN` runs; needs pytest."""
        from attnmux_vmoba.conformance import VMOBAAttentionConformance

        return VMOBAAttentionConformance
