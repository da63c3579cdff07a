"""The grid's patches, the choice among them, and attention over what was chosen."""

from dataclasses import dataclass
from typing import Any

import torch

from attnmux import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    UnsupportedRequestError,
)
from attnmux_blocksparse import BlockIndex, block_sparse_attention
from attnmux_nabla.plugin import SPEC

SIDE = 8
BLOCK = SIDE * SIDE


@dataclass
class NablaMetadata(AttentionMetadata):
    """The place `slot` [S] of every token when each patch of a frame has `BLOCK` places, and the tokens `sizes` [N] in each."""

    slot: torch.Tensor
    sizes: torch.Tensor
    threshold: float


class NablaBuilder(AttentionMetadataBuilder[NablaMetadata]):
    """Cuts the frames into patches."""

    def __init__(self) -> None: ...

    def prepare(self) -> None: ...

    def build(self, *, raw_latent_shape, patch_size, threshold=0.9, current_timestep=0, device="cpu") -> NablaMetadata:
        if not 0.0 < threshold <= 1.0:
            raise UnsupportedRequestError(f"threshold={threshold!r} must be in (0, 1]")
        frames, rows, columns = (size // patch for size, patch in zip(raw_latent_shape, patch_size, strict=True))
        t, y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in (frames, rows, columns)), indexing="ij")
        across, down = -(-columns // SIDE), -(-rows // SIDE)
        patch = ((t * down + y // SIDE) * across + x // SIDE).flatten()
        sizes = torch.bincount(patch, minlength=frames * down * across)
        order = patch.sort(stable=True).indices
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=device) - (sizes.cumsum(0) - sizes)[patch[order]]
        return NablaMetadata(current_timestep, patch * BLOCK + rank, sizes.int(), threshold)


@torch.no_grad()
def choose(q: torch.Tensor, k: torch.Tensor, sizes: torch.Tensor, scale: float, threshold: float) -> torch.Tensor:
    """Return the kept blocks, bool [B, H, N, N], of q and k [B, N * BLOCK, H, D] whose empty places hold zeros."""
    q, k = (x.float().unflatten(1, (-1, BLOCK)).sum(2) / sizes[:, None, None] for x in (q, k))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).softmax(-1)
    # from behind, so that of equal weights the patch of the lower number is kept
    ascending, order = weights.flip(-1).sort(dim=-1, stable=True)
    # what is left out weighs less than 1 - threshold; the heaviest block always stays
    kept = ascending.cumsum(-1) >= 1.0 - threshold
    kept[..., -1] = True
    return torch.zeros_like(kept).scatter(-1, order, kept).flip(-1)


class NablaImpl(AttentionImpl[NablaMetadata]):
    """NABLA of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.causal or self.num_heads != self.num_kv_heads:
            raise UnsupportedRequestError("NABLA_ATTN is not causal and has as many key heads as query heads")
        if self.head_size not in SPEC.capabilities.head_sizes:
            raise UnsupportedRequestError(f"NABLA_ATTN takes heads of 16 to 256 by 16, got head_size={self.head_size}")

    def forward(self, query, key, value, attn_metadata: NablaMetadata | None) -> torch.Tensor:
        if attn_metadata is None or not query.shape[1] == key.shape[1] == len(attn_metadata.slot):
            raise UnsupportedRequestError(
                f"NABLA_ATTN got S_q={query.shape[1]}, S_k={key.shape[1]} and metadata "
                f"{None if attn_metadata is None else f'of {len(attn_metadata.slot)} tokens'}; the numbers must agree"
            )
        slot, sizes = attn_metadata.slot, attn_metadata.sizes
        empty = query.new_zeros(query.shape[0], len(sizes) * BLOCK, *query.shape[2:])
        q, k, v = (empty.index_copy(1, slot, x) for x in (query, key, value))
        kept = choose(q, k, sizes, self.softmax_scale, attn_metadata.threshold)
        index = BlockIndex.from_block_mask(
            kept, block_q=BLOCK, block_k=BLOCK, width=len(sizes), q_lengths=sizes, k_lengths=sizes, finite_padding=True
        )
        return block_sparse_attention(q, k, v, index, softmax_scale=self.softmax_scale)[:, slot]


class NablaBackend(AttentionBackend):
    """Names the classes of the backend."""

    get_name = staticmethod(lambda: "NABLA_ATTN")
    get_impl_cls = staticmethod(lambda: NablaImpl)
    get_metadata_cls = staticmethod(lambda: NablaMetadata)
    get_builder_cls = staticmethod(lambda: NablaBuilder)
    get_supported_head_sizes = staticmethod(list)

    @staticmethod
    def get_conformance_cls() -> Any:
        from attnmux_nabla.conformance import Conformance

        return Conformance
