"""BlockIndex: which key blocks every query block attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import prepare

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_SIZES = (64, 128, 256)


class TransposedLists(NamedTuple):
    """The query blocks of every key block, as compressed rows.

    Attributes:
        offsets: int32 [B or 1, H or 1, N_k + 1].
        entries: int32 [B or 1, H or 1, N_q * K]; key block c was chosen by entries[offsets[c]:offsets[c + 1]], ascending.
        order: int32 [B or 1, H or 1, N_k], a permutation: the order in which the backward starts the key blocks.
    """

    offsets: torch.Tensor
    entries: torch.Tensor
    order: torch.Tensor


class BlockIndex:
    """For every query block a sorted list of the key blocks it attends to.

    The lists are as wide as the longest row, never as wide as the sequence. Tensors are kept as given, without a copy: writing
    into `blocks` and `counts` in place changes the index, also for a captured CUDA graph that was recorded with it.

    Args:
        blocks: int32 [B or 1, H or 1, N_q, K], last dimension contiguous, K >= 1. Row entries 0 .. count are key-block
            numbers, strictly ascending; the rest is not read. A dimension of 1 is shared by all batches or heads.
        counts: int32 [B or 1, H or 1, N_q], in [0, K]: entries of every row. 0 is an empty row: output 0, LSE -inf.
        num_key_blocks: N_k, the number of key blocks of the sequence, ceil(S_k / block_k).
        block_q, block_k: tokens per query and key block, each 64, 128 or 256.
        q_lengths, k_lengths: int32 [N] or [B or 1, N]: valid tokens of each block, in [0, block]; they are the first
            of the block. None: every block is full up to the end of the sequence. Query tokens beyond give output 0,
            LSE -inf and no gradient; key tokens beyond are not attended to.
        finite_padding: promise that tokens beyond a valid length hold finite numbers (zeros, say). The kernels then
            read whole blocks, which is faster. Without it padding may hold anything, NaN included.
        even_rows: say that all counts are about equal, as top-k selection makes them. It changes no result: the Hopper
            engine then gives every multiprocessor a fixed share of the query blocks, 4 % faster on even lists and
            15 to 25 % slower on lists of very uneven length.
        validate: "cheap" checks types and shapes; "full" also reads the values, which waits for the device.

    Raises:
        UnsupportedRequestError: a type, shape or (with "full") value that breaks the above; the message names it.
    """

    def __init__(
        self,
        blocks: torch.Tensor,
        counts: torch.Tensor,
        *,
        num_key_blocks: int,
        block_q: int,
        block_k: int,
        q_lengths: torch.Tensor | None = None,
        k_lengths: torch.Tensor | None = None,
        finite_padding: bool = False,
        even_rows: bool = False,
        validate: str = "cheap",
    ) -> None:
        self.blocks = blocks
        self.counts = counts
        self.num_key_blocks = num_key_blocks
        self.block_q = block_q
        self.block_k = block_k
        self.q_lengths = q_lengths[None] if q_lengths is not None and q_lengths.dim() == 1 else q_lengths
        self.k_lengths = k_lengths[None] if k_lengths is not None and k_lengths.dim() == 1 else k_lengths
        self.finite_padding = finite_padding
        self.even_rows = even_rows
        self._transposed: tuple[torch.Tensor, torch.Tensor, tuple[int, int], TransposedLists] | None = None
        self._of_heads: tuple[torch.Tensor, torch.Tensor, int, int, BlockIndex] | None = None
        if validate not in ("cheap", "full"):
            raise UnsupportedRequestError(f"validate={validate!r} is not known; use 'cheap' or 'full'.")
        self._check_shapes()
        if validate == "full":
            self.check_values()

    @classmethod
    def from_block_mask(
        cls, mask: torch.Tensor, *, block_q: int, block_k: int, width: int | None = None, **options: Any
    ) -> BlockIndex:
        """Build the index of a block mask.

        Args:
            mask: bool [N_q, N_k], [H or 1, N_q, N_k] or [B or 1, H or 1, N_q, N_k]; true where the block is attended to.
            block_q: tokens per query block.
            block_k: tokens per key block.
            width: list width K. None takes the longest row, which waits for the device once; a given width does not
                wait, and a longer row then fails with a device-side assertion.
            **options: q_lengths, k_lengths, finite_padding, even_rows, validate, as in the class.

        Raises:
            UnsupportedRequestError: mask is not bool or has a wrong rank, or width is below 1.
        """
        if mask.dtype != torch.bool or not 2 <= mask.dim() <= 4:
            raise UnsupportedRequestError(
                f"mask must be bool [N_q, N_k], [H, N_q, N_k] or [B, H, N_q, N_k]; got {mask.dtype} {tuple(mask.shape)}."
            )
        mask = mask[(None,) * (4 - mask.dim())]
        counts = mask.sum(-1) if mask.numel() else torch.zeros(1, dtype=torch.long)
        if width is None:
            longest, shortest = torch.stack([counts.amax(), counts.amin()]).tolist()
            width = max(1, longest)
            options.setdefault("even_rows", 10 * shortest >= 9 * longest)
        elif width < 1:
            raise UnsupportedRequestError(f"width={width!r} must be at least 1.")
        else:
            torch._assert_async(counts.amax() <= width, "a row of the block mask is longer than width")
        blocks, counts = prepare.lists_from_mask(mask, width)
        return cls(blocks, counts, num_key_blocks=mask.shape[-1], block_q=block_q, block_k=block_k, **options)

    @classmethod
    def from_topk(cls, scores: torch.Tensor, k: int, *, block_q: int, block_k: int, **options: Any) -> BlockIndex:
        """Keep the k key blocks of the highest score for every query block.

        Args:
            scores: [B or 1, H or 1, N_q, N_k], any floating type; compared in float32.
            k: blocks kept per row, exactly, in [1, N_k]. Among equal scores the lower block number wins.
            block_q: tokens per query block.
            block_k: tokens per key block.
            **options: as in `from_block_mask`, without width and even_rows.

        Raises:
            UnsupportedRequestError: scores has a wrong rank or type, or k is out of range.
        """
        if scores.dim() != 4 or not scores.is_floating_point():
            raise UnsupportedRequestError(
                f"scores must be floating point [B, H, N_q, N_k]; got {scores.dtype} {tuple(scores.shape)}."
            )
        if not 1 <= k <= scores.shape[-1]:
            raise UnsupportedRequestError(f"k={k!r} is out of range: 1 .. {scores.shape[-1]} key blocks.")
        best = scores.detach().float().sort(dim=-1, descending=True, stable=True).indices[..., :k]
        blocks = best.sort(-1).values.to(torch.int32)
        counts = torch.full(blocks.shape[:-1], k, dtype=torch.int32, device=blocks.device)
        return cls(
            blocks, counts, num_key_blocks=scores.shape[-1], block_q=block_q, block_k=block_k, even_rows=True, **options
        )

    @classmethod
    def from_predicate(
        cls,
        predicate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        num_query_blocks: int,
        num_key_blocks: int,
        *,
        block_q: int,
        block_k: int,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> BlockIndex:
        """Build the index of a static mask from a function of block coordinates.

        Args:
            predicate: called once with int64 tensors q_block [N_q, 1] and k_block [1, N_k]; returns bool that broadcasts
                to [N_q, N_k], [H, N_q, N_k] or [B, H, N_q, N_k].
            num_query_blocks: N_q.
            num_key_blocks: N_k.
            block_q: tokens per query block.
            block_k: tokens per key block.
            device: where the lists live.
            **options: as in `from_block_mask`.

        Raises:
            UnsupportedRequestError: the predicate returns something else.
        """
        q_block = torch.arange(num_query_blocks, device=device)[:, None]
        k_block = torch.arange(num_key_blocks, device=device)[None, :]
        mask = predicate(q_block, k_block)
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise UnsupportedRequestError(f"predicate must return a bool tensor; got {got}.")
        shape = torch.broadcast_shapes(mask.shape, (num_query_blocks, num_key_blocks))  # type: ignore[no-untyped-call]
        return cls.from_block_mask(mask.expand(shape), block_q=block_q, block_k=block_k, **options)

    @property
    def num_query_blocks(self) -> int:
        """N_q."""
        return self.blocks.shape[2]

    def to_block_mask(self) -> torch.Tensor:
        """The block mask, bool [B or 1, H or 1, N_q, N_k], true where the block is attended to."""
        return prepare.mask_from_lists(self.blocks, self.counts, self.num_key_blocks)

    def of_heads(self, first: int, last: int) -> BlockIndex:
        """The lists of query heads `first` to `last - 1`: the same memory, and this index itself where all heads share one list.

        It is kept, with its transposed lists, until others are asked for; under `torch.compile` it is part of the graph.
        """
        if self.blocks.shape[1] == 1:
            return self
        if self._of_heads is not None and not torch.compiler.is_compiling():
            blocks, counts, *heads, kept = self._of_heads
            if blocks is self.blocks and counts is self.counts and heads == [first, last]:
                return kept
        found = BlockIndex(
            self.blocks[:, first:last],
            self.counts[:, first:last],
            num_key_blocks=self.num_key_blocks,
            block_q=self.block_q,
            block_k=self.block_k,
            q_lengths=self.q_lengths,
            k_lengths=self.k_lengths,
            finite_padding=self.finite_padding,
            even_rows=self.even_rows,
        )
        if not torch.compiler.is_compiling():
            self._of_heads = (self.blocks, self.counts, first, last, found)
        return found

    def transpose(self) -> TransposedLists:
        """The query blocks of every key block; built without host synchronisation and kept until the lists change.

        A change in place is noticed. Under `torch.compile` and while a CUDA graph is captured the result is part of the graph
        and is not kept, so that a replay follows the lists.
        """
        from attnmux_blocksparse import ops

        if torch.compiler.is_compiling():
            return ops.transpose(self.blocks, self.counts, self.num_key_blocks)
        is_capturing = self.blocks.is_cuda and torch.cuda.is_current_stream_capturing()
        if is_capturing or self.blocks.is_inference() or self.counts.is_inference():
            return ops.transpose(self.blocks, self.counts, self.num_key_blocks)
        versions = (self.blocks._version, self.counts._version)
        if self._transposed is not None:
            blocks, counts, kept_versions, lists = self._transposed
            if blocks is self.blocks and counts is self.counts and kept_versions == versions:
                return lists
        lists = ops.transpose(self.blocks, self.counts, self.num_key_blocks)
        self._transposed = (self.blocks, self.counts, versions, lists)
        return lists

    def _check_shapes(self) -> None:
        """Types, ranks, shapes and devices; no values."""
        for name, size in (("block_q", self.block_q), ("block_k", self.block_k)):
            if size not in BLOCK_SIZES:
                raise UnsupportedRequestError(
                    f"{name}={size!r} is not supported; block sizes are 64, 128 and 256 tokens."
                )
        blocks, counts = self.blocks, self.counts
        for name, x, rank in (("blocks", blocks, 4), ("counts", counts, 3)):
            if x.dtype != torch.int32 or x.dim() != rank:
                shape = "[B, H, N_q, K]" if rank == 4 else "[B, H, N_q]"
                raise UnsupportedRequestError(
                    f"{name} must be int32 {shape}; got {x.dtype} {tuple(x.shape)}. Convert with .to(torch.int32)."
                )
        if blocks.shape[:3] != counts.shape:
            raise UnsupportedRequestError(
                f"counts must have the shape of blocks without its last dimension, {tuple(blocks.shape[:3])}; "
                f"got {tuple(counts.shape)}."
            )
        if blocks.shape[3] < 1:
            raise UnsupportedRequestError(
                "blocks must have at least one column (K >= 1); give empty rows a count of 0."
            )
        if (blocks.stride(3) != 1 and blocks.shape[3] > 1) or (counts.stride(2) != 1 and counts.shape[2] > 1):
            raise UnsupportedRequestError(
                "the last dimension of blocks and counts must be contiguous; call .contiguous()."
            )
        if counts.device != blocks.device:
            raise UnsupportedRequestError(
                f"counts is on {counts.device}, blocks on {blocks.device}; move them together."
            )
        sides = (
            ("q_lengths", self.q_lengths, self.num_query_blocks),
            ("k_lengths", self.k_lengths, self.num_key_blocks),
        )
        for name, lengths, number in sides:
            if lengths is None:
                continue
            if lengths.dtype != torch.int32 or lengths.dim() != 2 or lengths.shape[1] != number:
                raise UnsupportedRequestError(
                    f"{name} must be int32 [{number}] or [B, {number}]; got {lengths.dtype} {tuple(lengths.shape)}."
                )
            if lengths.device != blocks.device:
                raise UnsupportedRequestError(
                    f"{name} is on {lengths.device}, blocks on {blocks.device}; move them together."
                )
            if lengths.stride(1) != 1 and number > 1:
                raise UnsupportedRequestError(f"the last dimension of {name} must be contiguous; call .contiguous().")

    def check_values(self) -> None:
        """Check every list entry, count and valid length. Waits for the device.

        Raises:
            UnsupportedRequestError: naming the first offending row or block and its value.
        """
        blocks, counts, width = self.blocks, self.counts, self.blocks.shape[3]
        _refuse(counts, (counts < 0) | (counts > width), "counts", f"lies outside 0 .. {width} (the list width)")
        is_used = torch.arange(width, device=blocks.device) < counts[..., None]
        is_outside = is_used & ((blocks < 0) | (blocks >= self.num_key_blocks))
        _refuse(blocks, is_outside, "blocks", f"is out of range: there are {self.num_key_blocks} key blocks")
        if width > 1:
            is_disordered = is_used[..., 1:] & (blocks[..., 1:] <= blocks[..., :-1])
            _refuse(
                blocks[..., 1:],
                is_disordered,
                "blocks",
                "is not above the entry before it: sort each row, without duplicates",
            )
        for name, lengths, block in (
            ("q_lengths", self.q_lengths, self.block_q),
            ("k_lengths", self.k_lengths, self.block_k),
        ):
            if lengths is not None:
                _refuse(lengths, (lengths < 0) | (lengths > block), name, f"lies outside 0 .. {block} (the block size)")

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same lists, lengths and sizes. Waits for the device."""
        if not isinstance(other, BlockIndex):
            return NotImplemented
        fields = ("num_key_blocks", "block_q", "block_k", "finite_padding", "even_rows")
        if any(getattr(self, name) != getattr(other, name) for name in fields):
            return False
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("blocks", "counts", "q_lengths", "k_lengths")]
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    # the lists may change in place
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        lengths = [name for name in ("q_lengths", "k_lengths") if getattr(self, name) is not None]
        return (
            f"BlockIndex(blocks={tuple(self.blocks.shape)}, num_key_blocks={self.num_key_blocks}, "
            f"block_q={self.block_q}, block_k={self.block_k}{', ' if lengths else ''}{', '.join(lengths)})"
        )


def _refuse(values: torch.Tensor, is_wrong: torch.Tensor, name: str, why: str) -> None:
    """Raise for the first wrong value, with its place."""
    if bool(is_wrong.any()):
        place = tuple(is_wrong.nonzero()[0].tolist())
        raise UnsupportedRequestError(f"{name}{list(place)} = {int(values[place])} {why}.")
