"""Cases of BLOCK_SPARSE_ATTN for `attnmux bench`: lists of several kinds, and which keys they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnmux.bench import Case, Prepared
from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse.backend import BlockSparseAttentionMetadata
from attnmux_blocksparse.index import BlockIndex

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CASES", "LIST_KINDS", "ListPattern", "make_index", "prepare", "small_grid"]

_BLOCKS = ((64, 64), (128, 64), (128, 128))
_SINK_BLOCKS = 8
_SHARED_BY_NEIGHBOURS = 0.7


def small_grid(tokens: int) -> tuple[int, int, int]:
    """Return the grid of a shrunk video: the box of so many tokens that is nearest to a cube; thin ones are mostly padding."""
    divisors = [n for n in range(1, tokens + 1) if tokens % n == 0]
    boxes = [(a, b, tokens // a // b) for a in divisors for b in divisors if tokens // a % b == 0]
    return min(boxes, key=lambda box: (sum(box), box))


def _case(kind: str, blocks: tuple[int, int], length: int = 32768, *, name: str = "", **shape: int) -> Case:
    return Case(
        name=name or f"block_sparse_{kind}",
        S_q=length,
        lists=kind,
        keep=1.0 if kind == "dense" else 0.1,
        block_q=blocks[0],
        block_k=blocks[1],
        **shape,  # type: ignore[arg-type]
    )


MAIN_CASES = tuple(_case("random", blocks, length) for length in (32768, 76800) for blocks in _BLOCKS)
"""Random lists that keep a tenth, at the lengths and block sizes that models use."""

DENSE_LIST_CASES = (_case("dense", (128, 128)),)
"""Lists that hold every block: what the lists themselves cost."""

KIND_CASES = tuple(
    _case(kind, blocks, 32728 if kind == "ragged" else 32768)
    for kind in ("smooth", "uneven", "sink", "partial", "ragged")
    for blocks in _BLOCKS[:2]
)
"""Lists of other kinds; see `make_index`."""

SHAPE_CASES = tuple(
    _case("random", blocks, name=name, **shape)
    for name, shape in (("block_sparse_d64", {"D": 64}), ("block_sparse_gqa", {"H_kv": 3}))
    for blocks in _BLOCKS[:2]
)
"""Half the head size; four query heads per key head."""

CASES = {"BLOCK_SPARSE_ATTN": (*MAIN_CASES, *DENSE_LIST_CASES, *KIND_CASES, *SHAPE_CASES)}
"""Cases by backend, as `attnmux.bench` looks them up."""


def prepare(backend: str, case: Case, device: torch.device) -> Prepared:
    """Return metadata and pattern of a case.

    Args:
        backend: "BLOCK_SPARSE_ATTN".
        case: What is to be measured.
        device: Where the lists live.

    Raises:
        UnsupportedRequestError: The case has lists of an unknown kind.
    """
    index = make_index(case, device)
    return Prepared(ListPattern(index, case), BlockSparseAttentionMetadata(0, index))


def make_index(case: Case, device: torch.device, *, seed: int = 0) -> BlockIndex:
    """Return lists for a case, the same for the same seed and device.

    Args:
        case: `lists` is the kind. "random": uniform, all rows equally long; "dense": every block; "smooth": each second
            query block shares 70 % of its keys with the one before; "uneven": 1 to twice the mean; "sink": random, and 8
            key blocks in every list; "partial": random, every third key block half full; "ragged": random.
        device: Where the lists live.
        seed: Of the generator.

    Raises:
        UnsupportedRequestError: The kind is unknown.
    """
    kind = LIST_KINDS.get(case.lists)
    if kind is None:
        raise UnsupportedRequestError(
            f"case {case.name!r}: lists={case.lists!r} is not known; expected one of {tuple(LIST_KINDS)}"
        )
    blocks_q, blocks_k = -(-case.S_q // case.block_q), -(-case.S_k // case.block_k)
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.rand(case.B, case.H, blocks_q, blocks_k, generator=generator, device=device)
    return kind(case, scores, max(1, round(case.keep * blocks_k)), generator)


def _random(case: Case, scores: torch.Tensor, kept: int, generator: torch.Generator) -> BlockIndex:
    return BlockIndex.from_topk(scores, kept, block_q=case.block_q, block_k=case.block_k)


def _dense(case: Case, scores: torch.Tensor, kept: int, generator: torch.Generator) -> BlockIndex:
    return BlockIndex.from_topk(scores, scores.shape[-1], block_q=case.block_q, block_k=case.block_k)


def _smooth(case: Case, scores: torch.Tensor, kept: int, generator: torch.Generator) -> BlockIndex:
    lead = scores[:, :, 0::2].topk(kept, -1).indices
    bonus = torch.zeros_like(scores[:, :, 1::2])
    bonus.scatter_(-1, lead[:, :, : bonus.shape[2], : round(_SHARED_BY_NEIGHBOURS * kept)], 2.0)
    scores[:, :, 1::2] += bonus
    return _random(case, scores, kept, generator)


def _uneven(case: Case, scores: torch.Tensor, kept: int, generator: torch.Generator) -> BlockIndex:
    # a threshold of each row's own: the mask keeps as many blocks as a uniform draw says
    counts = torch.randint(1, 2 * kept + 1, (*scores.shape[:3], 1), generator=generator, device=scores.device)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return BlockIndex.from_block_mask(rank < counts, block_q=case.block_q, block_k=case.block_k, even_rows=False)


def _sink(case: Case, scores: torch.Tensor, kept: int, generator: torch.Generator) -> BlockIndex:
    scores[..., :_SINK_BLOCKS] += 2.0
    return _random(case, scores, kept, generator)


def _partial(case: Case, scores: torch.Tensor, kept: int, generator: torch.Generator) -> BlockIndex:
    lengths = torch.full((scores.shape[-1],), case.block_k, dtype=torch.int32, device=scores.device)
    lengths[::3] = case.block_k // 2
    return BlockIndex.from_topk(
        scores, kept, block_q=case.block_q, block_k=case.block_k, k_lengths=lengths, finite_padding=True
    )


LIST_KINDS: dict[str, Callable[[Case, torch.Tensor, int, torch.Generator], BlockIndex]] = {
    "random": _random,
    "dense": _dense,
    "smooth": _smooth,
    "uneven": _uneven,
    "sink": _sink,
    "partial": _partial,
    "ragged": _random,
}
"""What makes each kind of lists, from uniform scores and the number of key blocks to keep."""


class ListPattern:
    """Which keys the lists of an index mean; the `Pattern` of the correctness gate.

    Args:
        index: The lists.
        case: Gives lengths, samples and heads.
    """

    def __init__(self, index: BlockIndex, case: Case) -> None:
        self._index = index
        self._case = case
        self._mask: tuple[tuple[int, int], torch.Tensor] | None = None

    def visible(self, batch: int, head: int, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return bool `[len(rows), len(keys)]` for positions of queries and keys."""
        index = self._index
        mask = self._mask_of(batch % index.blocks.shape[0], head % index.blocks.shape[1])
        seen = mask[rows // index.block_q].index_select(1, keys // index.block_k)
        for lengths, positions, block, view in (
            (index.q_lengths, rows, index.block_q, (-1, 1)),
            (index.k_lengths, keys, index.block_k, (1, -1)),
        ):
            if lengths is not None:
                valid = positions % block < lengths[batch % lengths.shape[0], positions // block]
                seen = seen & valid.view(view)
        return seen

    def _mask_of(self, batch: int, head: int) -> torch.Tensor:
        """The block mask of one head, kept until another is asked for."""
        if self._mask is None or self._mask[0] != (batch, head):
            index = self._index
            blocks, counts = index.blocks[batch, head], index.counts[batch, head]
            used = torch.arange(blocks.shape[-1], device=blocks.device) < counts[:, None]
            # entries beyond the count go to a column that is cut off
            mask = torch.zeros(len(blocks), index.num_key_blocks + 1, dtype=torch.bool, device=blocks.device)
            mask.scatter_(1, torch.where(used, blocks, index.num_key_blocks).long(), True)
            self._mask = ((batch, head), mask[:, : index.num_key_blocks])
        return self._mask[1]

    def pairs(self) -> int:
        """Return how many pairs of query and key attend, over all samples and query heads."""
        index, case = self._index, self._case
        queries = _valid_tokens(case.S_q, index.block_q, index.q_lengths, index.blocks)
        keys = _valid_tokens(case.S_k, index.block_k, index.k_lengths, index.blocks)
        used = torch.arange(index.blocks.shape[-1], device=index.blocks.device) < index.counts[..., None]
        listed = torch.where(used, index.blocks, 0).long()
        total = 0
        for batch in range(case.B):
            place = batch % listed.shape[0]
            tokens = keys[batch % keys.shape[0]][listed[place]] * used[place]  # [H or 1, N_q, K]
            total += int((tokens.sum(-1) * queries[batch % queries.shape[0]]).sum()) * (case.H // listed.shape[1])
        return total


def _valid_tokens(length: int, block: int, lengths: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Valid tokens of every block, int64 `[B or 1, N]`."""
    starts = torch.arange(0, length, block, device=like.device)
    tokens = (length - starts).clamp(max=block)[None]
    return tokens if lengths is None else torch.minimum(tokens, lengths.long())
