"""The classes of the backend BLOCK_SPARSE_ATTN: the caller gives the lists, in the metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from attnmux.errors import ForwardContextError, UnsupportedRequestError
from attnmux_blocksparse.index import BlockIndex
from attnmux_blocksparse.kernels import ENGINES
from attnmux_blocksparse.kernels.configs import AUTOMATIC_ORDER
from attnmux_blocksparse.ops import block_sparse_attention

if TYPE_CHECKING:
    from attnmux.spec import AttentionRequest
    from attnmux_blocksparse.conformance import BlockSparseAttentionConformance

__all__ = [
    "BlockSparseAttentionBackend",
    "BlockSparseAttentionImpl",
    "BlockSparseAttentionMetadata",
    "BlockSparseAttentionMetadataBuilder",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class BlockSparseAttentionMetadata(AttentionMetadata):
    """The step and the lists of key blocks.

    Attributes:
        current_timestep: Index of the denoising step, from 0; attention does not read it.
        index: Which key blocks every query block attends to.
    """

    index: BlockIndex

    def __post_init__(self) -> None:
        if not isinstance(self.index, BlockIndex):
            raise UnsupportedRequestError(
                f"index must be a BlockIndex, got {type(self.index).__name__}; build it with BlockIndex.from_block_mask, "
                "from_topk or from_predicate"
            )


class BlockSparseAttentionMetadataBuilder(AttentionMetadataBuilder[BlockSparseAttentionMetadata]):
    """Wraps an index as metadata."""

    def __init__(self) -> None:
        """Nothing to keep."""

    def prepare(self) -> None:
        """Nothing to reset."""

    def build(  # type: ignore[override]
        self, *, index: BlockIndex, current_timestep: int = 0, **unknown: Any
    ) -> BlockSparseAttentionMetadata:
        """Return the metadata for one forward pass.

        Args:
            index: Which key blocks every query block attends to.
            current_timestep: Index of the denoising step, from 0.
            **unknown: None; each is refused by name.

        Raises:
            UnsupportedRequestError: `index` is no BlockIndex, or an argument is unknown.
        """
        if unknown:
            raise UnsupportedRequestError(
                f"{type(self).__name__}.build does not know the argument {', '.join(sorted(unknown))}; it takes index and "
                "current_timestep"
            )
        return BlockSparseAttentionMetadata(current_timestep, index)


class BlockSparseAttentionImpl(AttentionImpl[BlockSparseAttentionMetadata]):
    """Attention over the blocks that the metadata lists.

    Args:
        num_heads: Query heads, >= 1.
        head_size: Channels of one head: 16 to 256 in steps of 16.
        softmax_scale: Factor on the scores; None = `head_size ** -0.5`.
        causal: Must be False; a causal pattern of blocks is a matter of the lists.
        num_kv_heads: Key and value heads; None = `num_heads`.
        prefix: Name of the layer in its model, for messages.
        engine: One of the operator's engines; None takes the fastest that serves a call.
        **extra_impl_args: None; each is refused by name.

    Raises:
        UnsupportedRequestError: `causal` is set, the head size or engine is not supported, or an argument is unknown.
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
        engine: str | None = None,
        **extra_impl_args: Any,
    ) -> None:
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra_impl_args)
        if causal:
            raise UnsupportedRequestError(
                "BLOCK_SPARSE_ATTN cannot run causal=True: every token of a listed block is attended; use TORCH_SDPA or "
                "FLASH_ATTN for a causal layer"
            )
        if head_size % 16 or not 16 <= head_size <= 256:
            raise UnsupportedRequestError(
                f"BLOCK_SPARSE_ATTN takes head sizes 16 to 256 in steps of 16, got head_size={head_size}; pad the head"
            )
        if engine is not None and engine not in ENGINES:
            raise UnsupportedRequestError(f"engine={engine!r} is not known; engines are {', '.join(ENGINES)}")
        self.engine = engine

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: BlockSparseAttentionMetadata | None = None,
        *,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the output `[B, S_q, H, D]`, with `return_lse=True` also the LSE `[B, H, S_q]`.

        Args:
            query: `[B, S_q, H, D]`.
            key: `[B, S_k, H_kv, D]`.
            value: `[B, S_k, H_kv, D]`.
            attn_metadata: The lists.
            return_lse: Whether to return the log-sum-exp.

        Raises:
            ForwardContextError: There is no metadata.
            UnsupportedRequestError: See `block_sparse_attention`.
        """
        if attn_metadata is None:
            raise ForwardContextError(
                "BLOCK_SPARSE_ATTN needs the lists of key blocks and got no metadata; pass attn_metadata="
                "BlockSparseAttentionMetadata(current_timestep, index), or run under attnmux.set_forward_context"
            )
        if not isinstance(attn_metadata, BlockSparseAttentionMetadata):
            raise UnsupportedRequestError(
                f"BLOCK_SPARSE_ATTN needs BlockSparseAttentionMetadata, got {type(attn_metadata).__name__}"
            )
        if query.dtype not in _DTYPES:
            raise UnsupportedRequestError(f"query has dtype {query.dtype}; supported: {', '.join(map(str, _DTYPES))}")
        index = attn_metadata.index
        if self.total_num_heads != self.num_heads:
            # under sequence parallelism the caller's lists are those of all ranks' heads
            if index.blocks.shape[1] not in (1, self.total_num_heads):
                raise UnsupportedRequestError(
                    f"index lists blocks for {index.blocks.shape[1]} heads; this rank has heads {self.head_range[0]} to "
                    f"{self.head_range[1] - 1} of the layer's {self.total_num_heads}: give the lists of all, or one for all"
                )
            index = index.of_heads(*self.head_range)
        return block_sparse_attention(
            query,
            key,
            value,
            index,
            softmax_scale=self.softmax_scale,
            return_lse=return_lse,
            engine=self.engine,
        )


class BlockSparseAttentionBackend(AttentionBackend):
    """Names the classes of BLOCK_SPARSE_ATTN."""

    @staticmethod
    def get_name() -> str:
        """Return the backend's name."""
        return "BLOCK_SPARSE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[BlockSparseAttentionImpl]:
        """Return the class of one layer's attention."""
        return BlockSparseAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[BlockSparseAttentionMetadata]:
        """Return the class of the metadata."""
        return BlockSparseAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[BlockSparseAttentionMetadataBuilder]:
        """Return the class that builds the metadata."""
        return BlockSparseAttentionMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return 16 to 256 in steps of 16."""
        return list(range(16, 257, 16))

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return in which order engines are tried; which one serves depends on the tensors."""
        if request.device_type == "cpu":
            return "reference, plain PyTorch"
        return f"the first that serves the call: {', '.join(AUTOMATIC_ORDER)}"

    @staticmethod
    def get_conformance_cls() -> type[BlockSparseAttentionConformance]:
        """Return what `attnmux check BLOCK_SPARSE_ATTN` runs; needs pytest."""
        from attnmux_blocksparse.conformance import BlockSparseAttentionConformance

        return BlockSparseAttentionConformance
