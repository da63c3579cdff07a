"""The mask of a grid, as lists of blocks, and attention over them."""

from dataclasses import dataclass
from functools import lru_cache
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
from attnmux_radial.plugin import SPEC

BLOCK = 64


@dataclass
class RadialMetadata(AttentionMetadata):
    """The place `slot` [S] of every token when each frame starts a block, `places` in all, and the lists of blocks."""

    slot: torch.Tensor
    places: int
    index: BlockIndex


@lru_cache(maxsize=16)
def plan(frames: int, tokens: int, width: float, device: str) -> tuple[torch.Tensor, int, BlockIndex]:
    """Return slot, places and lists for frames of so many tokens."""
    per_frame = -(-tokens // BLOCK)
    block = torch.arange(frames * per_frame, device=device)
    frame, place = block // per_frame, block % per_frame
    apart = (frame[:, None] - frame).abs()
    octave = 2.0 ** apart.clamp(min=1).log2().floor()
    # the smallest distance between a position of the one block and one of the other
    nearest = ((place[:, None] - place).abs() * BLOCK - BLOCK + 1).clamp(min=0)
    band = tokens * width
    kept = (nearest + 1) * octave <= band
    kept |= (nearest == 0) & (apart % (octave / band).ceil() == 0)
    kept |= frame == 0
    sizes = (tokens - place * BLOCK).clamp(max=BLOCK).int()
    index = BlockIndex.from_block_mask(
        kept, block_q=BLOCK, block_k=BLOCK, q_lengths=sizes, k_lengths=sizes, finite_padding=True
    )
    token = torch.arange(frames * tokens, device=device)
    return token // tokens * per_frame * BLOCK + token % tokens, len(block) * BLOCK, index


class RadialBuilder(AttentionMetadataBuilder[RadialMetadata]):
    """Looks the plan of a grid up, or makes it."""

    def __init__(self) -> None: ...

    def prepare(self) -> None: ...

    def build(self, *, raw_latent_shape, patch_size, width=1.0, current_timestep=0, device="cpu") -> RadialMetadata:
        if not width > 0.0:
            raise UnsupportedRequestError(f"width={width!r} must be greater than 0")
        frames, rows, columns = (size // patch for size, patch in zip(raw_latent_shape, patch_size, strict=True))
        return RadialMetadata(current_timestep, *plan(frames, rows * columns, float(width), str(device)))


class RadialImpl(AttentionImpl[RadialMetadata]):
    """Radial Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.causal:
            raise UnsupportedRequestError("RADIAL_ATTN is not causal")
        if self.head_size not in SPEC.capabilities.head_sizes:
            raise UnsupportedRequestError(f"RADIAL_ATTN takes heads of 16 to 256 by 16, got head_size={self.head_size}")

    def forward(self, query, key, value, attn_metadata: RadialMetadata | None) -> torch.Tensor:
        if attn_metadata is None or not query.shape[1] == key.shape[1] == len(attn_metadata.slot):
            raise UnsupportedRequestError(
                f"RADIAL_ATTN got S_q={query.shape[1]}, S_k={key.shape[1]} and metadata "
                f"{None if attn_metadata is None else f'of {len(attn_metadata.slot)} tokens'}; the numbers must agree"
            )
        slot = attn_metadata.slot
        q, k, v = (
            x.new_zeros(x.shape[0], attn_metadata.places, *x.shape[2:]).index_copy(1, slot, x)
            for x in (query, key, value)
        )
        return block_sparse_attention(q, k, v, attn_metadata.index, softmax_scale=self.softmax_scale)[:, slot]


class RadialBackend(AttentionBackend):
    """Names the classes of the backend."""

    get_name = staticmethod(lambda: "RADIAL_ATTN")
    get_impl_cls = staticmethod(lambda: RadialImpl)
    get_metadata_cls = staticmethod(lambda: RadialMetadata)
    get_builder_cls = staticmethod(lambda: RadialBuilder)
    get_supported_head_sizes = staticmethod(list)

    @staticmethod
    def get_conformance_cls() -> Any:
        from attnmux_radial.conformance import Conformance

        return Conformance
