"""What the conformance suite of attnmux needs to know of this backend: lists, their oracle, their dense limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnmux.testing import BackendConformance, DenseLimit, dense_attention_oracle
from attnmux_blocksparse.backend import BlockSparseAttentionMetadata
from attnmux_blocksparse.index import BlockIndex

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnmux.backend import AttentionMetadata

__all__ = ["BlockSparseAttentionConformance"]

_BLOCK = 64


class BlockSparseAttentionConformance(BackendConformance):
    """Holds BLOCK_SPARSE_ATTN to dense attention in float64 under the mask that its lists mean."""

    backend = "BLOCK_SPARSE_ATTN"
    # Several blocks, the last one short.
    typical_length = 210

    def make_metadata(
        self, seq_len_q: int, seq_len_k: int, *, batch: int, device: torch.device
    ) -> BlockSparseAttentionMetadata:
        """Return lists that keep about half of the blocks; the last query block, if there are several, keeps none."""
        blocks_q, blocks_k = -(-seq_len_q // _BLOCK), -(-seq_len_k // _BLOCK)
        generator = torch.Generator().manual_seed(blocks_q * 1000 + blocks_k)
        mask = torch.rand(blocks_q, blocks_k, generator=generator) < 0.5
        mask[:, 0] |= ~mask.any(-1)
        if blocks_q > 1:
            mask[-1] = False
        return _listing(mask.to(device))

    def oracle(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return masked dense attention."""
        visible = _visible(metadata, q.shape[1], k.shape[1])
        return dense_attention_oracle(q, k, v, softmax_scale=options["softmax_scale"], attn_mask=visible)

    def oracle_lse(
        self, q: torch.Tensor, k: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return the log-sum-exp of masked dense attention."""
        visible = _visible(metadata, q.shape[1], k.shape[1])
        scale = options["softmax_scale"]
        return dense_attention_oracle(q, k, k, softmax_scale=scale, attn_mask=visible, return_lse=True)[1]

    def dense_limit(self, q: torch.Tensor, k: torch.Tensor) -> DenseLimit:
        """Return the lists that keep every block."""
        blocks_q, blocks_k = -(-q.shape[1] // _BLOCK), -(-k.shape[1] // _BLOCK)
        return DenseLimit(metadata=_listing(torch.ones(blocks_q, blocks_k, dtype=torch.bool, device=q.device)))

    def custom_ops(self, device: torch.device) -> Iterable[tuple[Any, tuple[Any, ...]]]:
        """Return the forward operator on small tensors."""
        index = self.make_metadata(130, 130, batch=1, device=device).index
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        q, k, v = (torch.randn(1, 130, 2, 32, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        lists = index.transpose()
        options = (index.block_q, index.block_k, False, False, 0.2, "")
        yield (
            torch.ops.attnmux_blocksparse.forward.default,
            (q, k, v, index.blocks, index.counts, None, None, *lists, *options),
        )


def _listing(mask: torch.Tensor) -> BlockSparseAttentionMetadata:
    return BlockSparseAttentionMetadata(0, BlockIndex.from_block_mask(mask, block_q=_BLOCK, block_k=_BLOCK))


def _visible(metadata: AttentionMetadata | None, length_q: int, length_k: int) -> torch.Tensor:
    assert isinstance(metadata, BlockSparseAttentionMetadata)
    mask = metadata.index.to_block_mask()
    return mask.repeat_interleave(_BLOCK, 2)[:, :, :length_q].repeat_interleave(_BLOCK, 3)[..., :length_k]
