"""The operators of `exchange`: what is packed and sent, and what has arrived and is unpacked.

A `sp_send_...` returns a flat tensor, in which what it sent for is under way until `arrived` has been called; with `waits` it
is there on return. A `sp_arrived_...` waits itself. Arguments: `ranges` are heads, the first and the one after the last, of
each tensor on rank 0, then on rank 1, and so on; where several tensors are under way, one such list behind the other.
`lengths` are the tokens of each rank, `rows` those with padding, `settings` come from `describe`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch

from attnmux.distributed.collective import arrived, exchange
from attnmux.distributed.direct import Elements, others
from attnmux.distributed.words import copy_words

__all__ = [
    "arrived_gradient_with_text",
    "arrived_gradients_of_heads",
    "arrived_shards",
    "count_heads",
    "send_gradients_of_heads",
    "send_gradients_of_shards",
    "send_heads",
    "send_shards",
]


def count_heads(ranges: tuple[int, ...] | list[int], size: int) -> list[list[int]]:
    """Return for each rank how many heads of each tensor it has."""
    each = [last - first for first, last in zip(ranges[::2], ranges[1::2], strict=True)]
    count = len(each) // size
    return [each[count * peer : count * (peer + 1)] for peer in range(size)]


def _ranges_of(ranges: list[int], size: int, ranks: range) -> list[int]:
    """Return the ranges of ranks that follow one another."""
    each = len(ranges) // size
    return ranges[each * ranks.start : each * ranks.stop]


def _totals(ranges: list[int], size: int) -> list[int]:
    """Return for each rank how many heads of all tensors it has."""
    return [sum(of_rank) for of_rank in count_heads(ranges, size)]


class _Piece(NamedTuple):
    """What a buffer holds of a tensor: the heads [first, first + h) of one rank, and `step` heads on those of the next, ...

    Attributes:
        tensor: Number of the tensor.
        first: Its first head.
        step: From one rank's first head to the next one's.
        part: `[ranks, B, rows, h, D]`.
    """

    tensor: int
    first: int
    step: int
    part: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same heads of a tensor `[B, rows, H, D]`."""
        batch, rows, _, dim = x.shape
        of_batch, of_row, of_head, of_dim = x.stride()
        ranks, heads = self.part.shape[0], self.part.shape[3]
        return x.as_strided(
            (ranks, batch, rows, heads, dim),
            (self.step * of_head, of_batch, of_row, of_head, of_dim),
            x.storage_offset() + self.first * of_head,
        )


def _pieces(buffer: torch.Tensor, ranges: list[int], size: int, rows: int, batch: int, dim: int) -> list[_Piece]:
    """Return what a buffer holds that has for each rank `[rows, B, its heads of all tensors, D]`.

    It is one piece for each tensor if every rank has as many heads, and so many heads on from the rank before; else for each rank.
    """
    counts = count_heads(ranges, size)
    firsts = [of_rank[::2] for of_rank in _by_group(ranges, size)]
    steps = [second - first for first, second in zip(*firsts[:2], strict=True)] if size > 1 else [0] * len(counts[0])
    is_regular = all(of_rank == counts[0] for of_rank in counts) and all(
        firsts[rank][t] == firsts[0][t] + rank * step and step >= counts[0][t]
        for rank in range(1, size)
        for t, step in enumerate(steps)
    )
    if is_regular:
        parts = torch.split(buffer.view(size, rows, batch, sum(counts[0]), dim), counts[0], dim=3)
        return [_Piece(t, firsts[0][t], steps[t], part.transpose(1, 2)) for t, part in enumerate(parts)]
    pieces = []
    blocks = torch.split(buffer, [rows * batch * sum(of_rank) * dim for of_rank in counts])
    for block, of_rank, first in zip(blocks, counts, firsts, strict=True):
        parts = torch.split(block.view(1, rows, batch, sum(of_rank), dim), of_rank, dim=3)
        pieces += [_Piece(t, first[t], 0, part.transpose(1, 2)) for t, part in enumerate(parts)]
    return pieces


def _by_group(ranges: list[int], groups: int) -> list[list[int]]:
    length = len(ranges) // groups
    return [ranges[length * group : length * (group + 1)] for group in range(groups)]


def _sizes(lengths: list[int], rows: list[int], batch: int, text: int) -> dict[str, object]:
    """Return the sizes that ranks have to agree on; not part of the settings, which a compiled graph holds as they are."""
    return {"lengths": lengths, "rows": rows, "batch": batch, "text": text}


def _heads_numel(ranges: list[int], lengths: list[int], rank: int, unit: int, text: int) -> int:
    """Return the elements of what is under way, the same forward and backward, with the rank's heads of the text behind it."""
    counts = _totals(ranges, len(lengths))
    return unit * (_larger(sum(lengths) * counts[rank], lengths[rank] * sum(counts)) + text * counts[rank])


def _shards_numel(ranges: list[int], lengths: list[int], rank: int, unit: int, text: int) -> int:
    counts = _totals(ranges, len(lengths))
    long = (sum(lengths) + len(lengths) * text) * counts[rank]
    return unit * _larger((lengths[rank] + text) * sum(counts), long)


def _larger(one: int, other: int) -> int:
    # what is the larger must not be asked while a graph is made that holds for any lengths
    larger: int = torch.sym_max(one, other)  # type: ignore[no-untyped-call]
    return larger


@torch.library.custom_op("attnmux::sp_send_heads", mutates_args=())
def send_heads(
    tensors: list[torch.Tensor],
    text: list[torch.Tensor],
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    """Send each rank its heads of `tensors`, each `[B, rows, H_t, D]`; the text's, `[B, T, H_t, D]`, are written behind."""
    size, length, total = len(lengths), lengths[rank], sum(lengths)
    batch, _, _, dim = tensors[0].shape
    unit, tail = batch * dim, text[0].shape[1] if text else 0
    counts = _totals(ranges, size)

    def write(ranks: range, part: torch.Tensor) -> None:
        for piece in _pieces(part, _ranges_of(ranges, size, ranks), len(ranks), length, batch, dim):
            copy_words(piece.part, piece.of(tensors[piece.tensor][:, :length]))

    result = tensors[0].new_empty(_heads_numel(ranges, lengths, rank, unit, tail))
    exchange(
        result[: total * unit * counts[rank]],
        Elements([n * unit for n in lengths], counts, rank),
        write,
        "to_heads",
        settings,
        _sizes(lengths, rows, batch, tail),
        waits=waits,
    )
    if text:
        own = _by_group(ranges, size)[rank]
        behind = result[total * unit * counts[rank] :][: tail * unit * counts[rank]]
        for piece in _pieces(behind, own, 1, tail, batch, dim):
            copy_words(piece.part, piece.of(text[piece.tensor]))
    return result


@send_heads.register_fake
def _(
    tensors: list[torch.Tensor],
    text: list[torch.Tensor],
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    batch, _, _, dim = tensors[0].shape
    tail = text[0].shape[1] if text else 0
    return tensors[0].new_empty(_heads_numel(ranges, lengths, rank, batch * dim, tail))


@torch.library.custom_op("attnmux::sp_send_gradients_of_heads", mutates_args=())
def send_gradients_of_heads(
    grads: list[torch.Tensor],
    tail: int,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    """Send each rank the gradients of its tokens, `[B, S + T, h_t, D]` for each tensor; those of the `tail` T stay, behind."""
    size, length, total = len(lengths), lengths[rank], sum(lengths)
    batch, _, _, dim = grads[0].shape
    unit, counts, own = batch * dim, _totals(ranges, size), _by_group(ranges, size)[rank]
    firsts = list(accumulate(lengths, initial=0))

    def write(ranks: range, part: torch.Tensor) -> None:
        first, last = firsts[ranks.start], firsts[ranks.stop]
        for piece in _pieces(part, own, 1, last - first, batch, dim):
            copy_words(piece.part[0], grads[piece.tensor][:, first:last])

    result = grads[0].new_empty(_heads_numel(ranges, lengths, rank, unit, tail))
    exchange(
        result[: length * unit * sum(counts)],
        Elements(counts, [n * unit for n in lengths], rank),
        write,
        "to_heads backward",
        settings,
        _sizes(lengths, rows, batch, tail),
        waits=waits,
    )
    behind = result[length * unit * sum(counts) :][: tail * unit * counts[rank]]
    for piece in _pieces(behind, own, 1, tail, batch, dim):
        copy_words(piece.part[0], grads[piece.tensor][:, total:])
    return result


@send_gradients_of_heads.register_fake
def _(
    grads: list[torch.Tensor],
    tail: int,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    batch, _, _, dim = grads[0].shape
    return grads[0].new_empty(_heads_numel(ranges, lengths, rank, batch * dim, tail))


@torch.library.custom_op("attnmux::sp_arrived_gradients_of_heads", mutates_args=())
def arrived_gradients_of_heads(
    under_way: list[torch.Tensor],
    heads: list[int],
    held: int,
    tail: int,
    batch: int,
    dim: int,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> list[torch.Tensor]:
    """Return the gradients `[B, held, H_t, D]` of the tensors, then `[B, tail, H_t, D]` of their text."""
    size, length, unit = len(lengths), lengths[rank], batch * dim
    grads = [under_way[0].new_empty(batch, held, n, dim) for n in heads]
    for x in grads if held > length else ():
        x[:, length:] = 0
    text = [under_way[0].new_zeros(batch, tail, n, dim) for n in heads]
    written = set()
    # the order in which they were sent
    for flat, of_group in reversed(list(zip(under_way, _by_group(ranges, len(under_way)), strict=True))):
        arrived(flat, "to_heads backward", settings)
        counts = _totals(of_group, size)
        end = length * unit * sum(counts)
        for piece in _pieces(flat[:end], of_group, size, length, batch, dim):
            grad, place = piece.of(grads[piece.tensor][:, :length]), (piece.tensor, piece.first)
            if place in written:
                # a key head that went to several ranks gets the sum of what they return, in rank order
                grad += piece.part
            elif piece.part.shape[3]:
                copy_words(grad, piece.part)
                written.add(place)
        behind, own = flat[end:][: tail * unit * counts[rank]], _by_group(of_group, size)[rank]
        for piece in _pieces(behind, own, 1, tail, batch, dim):
            copy_words(piece.of(text[piece.tensor]), piece.part)
    return grads + text


@arrived_gradients_of_heads.register_fake
def _(
    under_way: list[torch.Tensor],
    heads: list[int],
    held: int,
    tail: int,
    batch: int,
    dim: int,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> list[torch.Tensor]:
    return [under_way[0].new_empty(batch, length, n, dim) for length in (held, tail) for n in heads]


@torch.library.custom_op("attnmux::sp_send_shards", mutates_args=())
def send_shards(
    x: torch.Tensor,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    """Send each rank its tokens of x, `[B, S + T, h, D]`, and the text; x is read until it has arrived everywhere."""
    batch, long, own, dim = x.shape
    total, length, unit = sum(lengths), lengths[rank], batch * dim
    tail = long - total
    counts = _totals(ranges, len(lengths))
    flat, firsts = x.transpose(0, 1), list(accumulate(lengths, initial=0))  # [S + T, B, h, D]

    def write(ranks: range, part: torch.Tensor) -> None:
        blocks = [lengths[peer] + tail for peer in ranks]
        for peer, block in zip(ranks, torch.split(part.view(sum(blocks), batch, own, dim), blocks), strict=True):
            copy_words(block[: lengths[peer]], flat[firsts[peer] : firsts[peer + 1]])
            copy_words(block[lengths[peer] :], flat[total:])

    result = x.new_empty(_shards_numel(ranges, lengths, rank, unit, tail))
    exchange(
        result[: (length + tail) * unit * sum(counts)],
        Elements(counts, [(n + tail) * unit for n in lengths], rank),
        write,
        "to_shards",
        settings,
        _sizes(lengths, rows, batch, tail),
        waits=waits,
        # the rank's own part is taken from x when the others' arrives
        takes_own=False,
        as_it_is=None if tail or not flat.is_contiguous() else flat.view(-1),
    )
    return result


@send_shards.register_fake
def _(
    x: torch.Tensor,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    batch, long, _, dim = x.shape
    return x.new_empty(_shards_numel(ranges, lengths, rank, batch * dim, long - sum(lengths)))


@torch.library.custom_op("attnmux::sp_arrived_shards", mutates_args=())
def arrived_shards(
    under_way: list[torch.Tensor],
    sent: list[torch.Tensor],
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[B, rows, H, D]`, zeros in rows of padding, and the text `[B, T, H, D]`; of `sent` the rank's own tokens."""
    batch, long, _, dim = sent[0].shape
    size, length, tail = len(lengths), lengths[rank], long - sum(lengths)
    heads = sum(_totals(ranges, len(ranges) // 2))
    shard = sent[0].new_empty(batch, rows[rank], heads, dim)
    if rows[rank] > length:
        shard[:, length:] = 0
    text = sent[0].new_empty(batch, tail, heads, dim)
    first = sum(lengths[:rank])
    for flat, of_group, x in zip(under_way, _by_group(ranges, len(under_way)), sent, strict=True):
        own = slice(*_by_group(of_group, size)[rank])
        copy_words(shard[:, :length, own], x[:, first : first + length])
        copy_words(text[:, :, own], x[:, long - tail :])
        arrived(flat, "to_shards", settings)
        starts = [(length + tail) * batch * dim * n for n in accumulate(_totals(of_group, size), initial=0)]
        for ranks in others(rank, size):
            part, of_ranks = flat[starts[ranks.start] : starts[ranks.stop]], _ranges_of(of_group, size, ranks)
            for piece in _pieces(part, of_ranks, len(ranks), length + tail, batch, dim):
                copy_words(piece.of(shard[:, :length]), piece.part[:, :, :length])
                copy_words(piece.of(text), piece.part[:, :, length:])
    return shard, text


@arrived_shards.register_fake
def _(
    under_way: list[torch.Tensor],
    sent: list[torch.Tensor],
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, long, _, dim = sent[0].shape
    heads = sum(_totals(ranges, len(ranges) // 2))
    return sent[0].new_empty(batch, rows[rank], heads, dim), sent[0].new_empty(batch, long - sum(lengths), heads, dim)


@torch.library.custom_op("attnmux::sp_send_gradients_of_shards", mutates_args=())
def send_gradients_of_shards(
    grad: torch.Tensor,
    grad_text: torch.Tensor,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    """Send each rank its heads of the gradients `[B, rows, H, D]` and, of the text, `[B, T, H, D]`."""
    batch, tail, _, dim = grad_text.shape
    size, length, unit, counts = len(lengths), lengths[rank], batch * dim, _totals(ranges, len(lengths))

    def write(ranks: range, part: torch.Tensor) -> None:
        for piece in _pieces(part, _ranges_of(ranges, size, ranks), len(ranks), length + tail, batch, dim):
            copy_words(piece.part[:, :, :length], piece.of(grad[:, :length]))
            copy_words(piece.part[:, :, length:], piece.of(grad_text))

    result = grad.new_empty(_shards_numel(ranges, lengths, rank, unit, tail))
    exchange(
        result[: (sum(lengths) + size * tail) * unit * counts[rank]],
        Elements([(n + tail) * unit for n in lengths], counts, rank),
        write,
        "to_shards backward",
        settings,
        _sizes(lengths, rows, batch, tail),
        waits=waits,
    )
    return result


@send_gradients_of_shards.register_fake
def _(
    grad: torch.Tensor,
    grad_text: torch.Tensor,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    batch, tail, _, dim = grad_text.shape
    return grad.new_empty(_shards_numel(ranges, lengths, rank, batch * dim, tail))


@torch.library.custom_op("attnmux::sp_arrived_gradient_with_text", mutates_args=())
def arrived_gradient_with_text(
    under_way: torch.Tensor, long: int, batch: int, own: int, dim: int, lengths: list[int], settings: str
) -> torch.Tensor:
    """Return the gradient `[long, B, own, D]` of what was sent, that of the text being the sum over all ranks."""
    total, unit = sum(lengths), batch * own * dim
    tail = long - total
    arrived(under_way, "to_shards backward", settings)
    result = under_way.new_empty(long, batch, own, dim)
    result[total:] = 0
    token, at = 0, 0
    for n in lengths:
        view = under_way[at : at + (n + tail) * unit].view(n + tail, batch, own, dim)
        result[token : token + n] = view[:n]
        # every rank returned the text, so its gradient is the sum of theirs, in rank order
        result[total:] += view[n:]
        token, at = token + n, at + (n + tail) * unit
    return result


@arrived_gradient_with_text.register_fake
def _(
    under_way: torch.Tensor, long: int, batch: int, own: int, dim: int, lengths: list[int], settings: str
) -> torch.Tensor:
    return under_way.new_empty(long, batch, own, dim)
