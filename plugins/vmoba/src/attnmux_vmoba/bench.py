"""Cases of VMOBA_ATTN for `attnmux bench` and `benchmarks/vmoba.py`: the three kinds of chunk, by top-k and by threshold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from attnmux.bench import Case, Prepared, draw_inputs
from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse.bench import small_grid
from attnmux_vmoba.backend import VMOBAAttentionMetadata, VMOBAAttentionMetadataBuilder
from attnmux_vmoba.ops import select_bits
from attnmux_vmoba.prepare import from_chunk_order, self_chunks, unpack_bits

if TYPE_CHECKING:
    from attnmux_vmoba.prepare import ChunkGrid, Selection

__all__ = ["CASES", "GRID", "LAYERS", "THRESHOLD", "ChosenPattern", "describe", "prepare"]

GRID = (20, 48, 32)
"""Tokens along T, H and W; the default chunks of the metadata cut it into 5, 16 and 80."""

LAYERS = {"temporal": (3, 5), "spatial": (3, 16), "spatio_temporal": (8, 80)}
"""By kind of chunk: top-k and the number of chunks."""

THRESHOLD = 0.25
# what it keeps of unit normal inputs, the mean over queries
_KEPT_BY_THRESHOLD = {"temporal": 0.32, "spatial": 0.19, "spatio_temporal": 0.16}

CASES = {
    "VMOBA_ATTN": tuple(
        Case(name=f"vmoba_{kind}", S_q=math.prod(GRID), lists="top-k", keep=topk / chunks)
        for kind, (topk, chunks) in LAYERS.items()
    )
    + tuple(
        Case(name=f"vmoba_{kind}", S_q=math.prod(GRID), lists=f"threshold {THRESHOLD}", keep=kept)
        for kind, kept in _KEPT_BY_THRESHOLD.items()
    )
}
"""Cases by backend, as `attnmux.bench` looks them up."""


def describe(case: Case) -> VMOBAAttentionMetadata:
    """Return the metadata of a case.

    Raises:
        UnsupportedRequestError: The case is of no kind in `LAYERS`.
    """
    kind = case.name.removeprefix("vmoba_")
    if kind not in LAYERS:
        raise UnsupportedRequestError(f"case {case.name!r} is not one of {[f'vmoba_{kind}' for kind in LAYERS]}")
    temporal_layer, spatial_layer, st_layer = (int(kind == other) for other in LAYERS)
    topk = LAYERS[kind][0]
    return VMOBAAttentionMetadataBuilder().build(
        0,
        GRID if math.prod(GRID) == case.S_q else small_grid(case.S_q),
        (1, 1, 1),
        temporal_topk=topk,
        spatial_topk=topk,
        st_topk=topk,
        moba_select_mode="threshold" if case.lists.startswith("threshold") else "topk",
        moba_threshold=THRESHOLD,
        temporal_layer=temporal_layer,
        spatial_layer=spatial_layer,
        st_layer=st_layer,
    )


def prepare(backend: str, case: Case, device: torch.device) -> Prepared:
    """Return metadata and pattern of a case.

    Args:
        backend: "VMOBA_ATTN".
        case: What is to be measured.
        device: Where the inputs live.
    """
    metadata = describe(case)
    kind = metadata.kind_of_layer(0)
    assert kind is not None
    chunks = metadata.chunks[kind]
    assert chunks is not None
    q, k, _ = draw_inputs(case, device)
    return Prepared(ChosenPattern(q, k, chunks, metadata.selection(kind)), metadata)


class ChosenPattern:
    """Which keys the chosen chunks of q and k mean; the `Pattern` of the correctness gate. The choice itself is held by tests.

    Args:
        q: `[B, S, H, D]` in raster order.
        k: `[B, S, H_kv, D]`, likewise.
        chunks: The chunks.
        how: How they are chosen.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, chunks: ChunkGrid, how: Selection) -> None:
        chosen = unpack_bits(select_bits(q, k, chunks, how), chunks.num_chunks)  # [B, H, C, S]
        self._chosen = from_chunk_order(chosen.permute(0, 3, 1, 2), chunks)  # [B, S, H, C]
        own = self_chunks(chunks, q.device).int().argmax(0)  # [S], in chunk order
        self._chunk = from_chunk_order(own[None, :, None, None], chunks)[0, :, 0, 0]
        self._pairs = int((chosen.sum((0, 1, 3)) * torch.bincount(own, minlength=chunks.num_chunks)).sum())

    def visible(self, batch: int, head: int, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return bool `[len(rows), len(keys)]` for positions of queries and keys."""
        return self._chosen[batch, rows, head][:, self._chunk[keys]]

    def pairs(self) -> int:
        """Return how many pairs of query and key attend, over all samples and query heads."""
        return self._pairs
