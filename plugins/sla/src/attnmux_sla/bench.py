"""Cases of SLA_ATTN for `attnmux bench` and `benchmarks/sla.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnmux.bench import Case, DensePattern, Prepared, draw_inputs
from attnmux_blocksparse.bench import ListPattern
from attnmux_sla.backend import SLAAttentionMetadata
from attnmux_sla.ops import select_blocks

if TYPE_CHECKING:
    import torch

    from attnmux.bench import Pattern

__all__ = ["CASES", "prepare"]

CASES = {
    "SLA_ATTN": tuple(
        Case(name="sla", S_q=length, keep=ratio, block_q=128, block_k=64, lists="top-k")
        for length in (32768, 76800)
        for ratio in (0.1, 0.05)
    )
}
"""Cases by backend, as `attnmux.bench` looks them up: the lengths of Wan 2.1 at 480p and 720p, rounded to whole blocks."""


def prepare(backend: str, case: Case, device: torch.device) -> Prepared:
    """Return metadata and pattern of a case. A fresh layer's projection is zero, so that it is block-sparse attention.

    Args:
        backend: "SLA_ATTN".
        case: What is to be measured.
        device: Where the inputs live.
    """
    pattern: Pattern = DensePattern(case) if case.keep == 1 else _ChosenPattern(case, device)
    impl_args = {"BLKQ": case.block_q or 128, "BLKK": case.block_k or 64}
    return Prepared(pattern, SLAAttentionMetadata(0, case.keep), impl_args=impl_args)


class _ChosenPattern:
    """The blocks that are chosen for the inputs of `attnmux.bench`."""

    def __init__(self, case: Case, device: torch.device) -> None:
        q, k, _ = draw_inputs(case, device)
        index = select_blocks(q, k, topk_ratio=case.keep, block_q=case.block_q, block_k=case.block_k)
        self._lists = ListPattern(index, case)

    def visible(self, batch: int, head: int, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return bool `[len(rows), len(keys)]` for positions of queries and keys."""
        return self._lists.visible(batch, head, rows, keys)

    def pairs(self) -> int:
        """Return how many pairs of query and key attend, over all samples and query heads."""
        return self._lists.pairs()
