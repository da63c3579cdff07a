"""Tokens for heads in one all-to-all, and back in one; or in as many as there are groups of heads.

`send_heads` starts what turns shards that hold some tokens and all heads into tensors that hold all tokens and some heads,
`arrived_heads` gives these; `send_shards` and `arrived_shards` are the way back. Several tensors travel in one buffer
`[S, B, heads of all tensors, D]`, in which every rank's part is one block: what arrives needs no rearranging, each tensor is
a strided view of it. Tokens that all ranks hold (text) are written behind the sequence, and on the way back every rank
sends all others its heads of them in the same all-to-all.

With several groups of heads, all that is sent for the first time is under way before anything is waited for. What is under
way is a flat tensor, with torch's handle registered for it. Its gradient, of the same size, is what is under way in
backward: `arrived_heads` sends there what `send_heads` waits for. The autograd engine runs first what was last in
forward, so that all shards' gradients leave at once, and those of a group's heads before the next group is attended to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnmux.distributed.collective import arrived, begin_all_to_all

if TYPE_CHECKING:
    from attnmux.distributed.plan import HeadPlan, SeqPlan

__all__ = ["Exchange", "arrived_heads", "arrived_shards", "send_heads", "send_shards"]


@dataclass(frozen=True)
class Exchange:
    """What the operators of one call have in common.

    Attributes:
        heads: Of each group of heads, first and one after the last of each tensor on rank 0, then on rank 1, ...
        shard_heads: Likewise of the output alone.
        lengths: Tokens of each rank.
        rows: Rows of each rank, padding included.
        rank: This rank.
        settings: From `describe`, of each group of heads.
        text: Tokens T that every rank holds.
    """

    heads: tuple[tuple[int, ...], ...]
    shard_heads: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    rank: int
    settings: tuple[str, ...]
    text: int

    @classmethod
    def of(
        cls, groups: tuple[HeadPlan, ...], tensors: str, plan: SeqPlan, rank: int, settings: str, text: int = 0
    ) -> Exchange:
        """Return the exchange among the ranks of a plan.

        Args:
            groups: Which heads each rank attends with, group by group.
            tensors: A letter for each tensor: "q" if it has as many heads as q, "k" if as k.
            plan: Where the tokens are.
            rank: This rank.
            settings: From `describe`.
            text: Tokens that every rank holds.
        """
        heads = []
        for group in groups:
            of_tensor = [group.q if letter == "q" else group.kv for letter in tensors]
            heads.append(
                tuple(bound for of_ranks in zip(*of_tensor, strict=True) for pair in of_ranks for bound in pair)
            )
        shard_heads = tuple(tuple(bound for pair in group.q for bound in pair) for group in groups)
        numbered = tuple(f"{settings}\noverlap_group={number}" for number in range(len(groups)))
        return cls(
            tuple(heads), shard_heads, plan.lengths, plan.rows, rank, numbered if len(groups) > 1 else (settings,), text
        )

    def of_group(self, ranges: tuple[tuple[int, ...], ...], group: int) -> tuple[Any, ...]:
        """Return the last arguments of an operator that sends; with a single group it waits, as there is nothing else to do."""
        return list(ranges[group]), *self._places(), self.settings[group], len(self.settings) == 1

    def of_all(self, ranges: tuple[tuple[int, ...], ...]) -> tuple[Any, ...]:
        """Return the last arguments of an operator that receives."""
        return [bound for of_group in ranges for bound in of_group], *self._places(), self.settings[0]

    def _places(self) -> tuple[Any, ...]:
        return list(self.lengths), list(self.rows), self.rank


def send_heads(exchange: Exchange, tensors: list[torch.Tensor], text: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Send each rank its heads of this rank's tokens.

    Args:
        exchange: The ranks.
        tensors: Each `[B, rows, H_t, D]`, any strides; rows of padding are not sent.
        text: As many `[B, T, H_t, D]`, the same on every rank; or none.

    Returns:
        For each group of heads what is under way to this rank.
    """
    result: tuple[torch.Tensor, ...] = _SendHeads.apply(exchange, *tensors, *text)  # type: ignore[no-untyped-call]
    return result


def arrived_heads(
    exchange: Exchange, group: int, under_way: torch.Tensor, batch: int, dim: int
) -> tuple[torch.Tensor, ...]:
    """Return for each tensor all tokens of this rank's heads of a group.

    Args:
        exchange: As it was sent.
        group: Which group of heads.
        under_way: What `send_heads` returned for it.
        batch: Batch size B.
        dim: Head size D.

    Returns:
        For each tensor a view `[B, S + T, h_t, D]`, D contiguous, of one buffer.
    """
    result: tuple[torch.Tensor, ...]
    result = _ArrivedHeads.apply(exchange, group, batch, dim, under_way)  # type: ignore[no-untyped-call]
    return result


def send_shards(exchange: Exchange, group: int, x: torch.Tensor) -> torch.Tensor:
    """Send each rank its tokens of this rank's heads of a group, and the text.

    Args:
        exchange: The ranks.
        group: Which group of heads.
        x: `[B, S + T, h, D]`, text last; any strides. It is read until `arrived_shards` returns.

    Returns:
        What is under way to this rank.
    """
    result: torch.Tensor = _SendShards.apply(exchange, group, x)  # type: ignore[no-untyped-call]
    return result


def arrived_shards(
    exchange: Exchange, under_way: list[torch.Tensor], sent: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's tokens of all heads, and the text of all heads.

    Args:
        exchange: As it was sent.
        under_way: For each group what `send_shards` returned.
        sent: For each group what it was given.

    Returns:
        `[B, rows, H, D]`, zeros in rows of padding, and `[B, T, H, D]`.
    """
    result: tuple[torch.Tensor, torch.Tensor]
    result = _ArrivedShards.apply(exchange, *under_way, *sent)  # type: ignore[no-untyped-call]
    return result


class _SendHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(inputs) // 2 if exchange.text else len(inputs)
        tensors, text = list(inputs[:count]), list(inputs[count:])
        ctx.exchange, ctx.heads, ctx.count = exchange, [x.shape[2] for x in tensors], len(inputs)
        batch, held, _, dim = tensors[0].shape
        ctx.sizes = held, exchange.text, batch, dim
        return tuple(
            _send_heads(tensors, text, *exchange.of_group(exchange.heads, group))
            for group in range(len(exchange.settings))
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *under_way: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange = ctx.exchange
        grads = _arrived_gradients_of_heads(list(under_way), ctx.heads, *ctx.sizes, *exchange.of_all(exchange.heads))
        return None, *grads[: ctx.count]


class _ArrivedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, group: int, batch: int, dim: int, under_way: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange, ctx.group = exchange, group
        heads = _counts(exchange.heads[group], len(exchange.lengths))[exchange.rank]
        shape = sum(exchange.lengths) + exchange.text, batch, sum(heads), dim
        buffer = _view(arrived(under_way, "to_heads", exchange.settings[group]), shape)
        return tuple(part.transpose(0, 1) for part in torch.split(buffer, heads, dim=2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange = ctx.exchange
        under_way = _send_gradients_of_heads(list(grads), exchange.text, *exchange.of_group(exchange.heads, ctx.group))
        return None, None, None, None, under_way


class _SendShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, group: int, x: torch.Tensor) -> torch.Tensor:
        ctx.exchange, ctx.group = exchange, group
        ctx.shape = x.shape[1], x.shape[0], x.shape[2], x.shape[3]
        under_way: torch.Tensor = _send_shards(x, *exchange.of_group(exchange.shard_heads, group))
        return under_way

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, under_way: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange, settings = ctx.exchange, ctx.exchange.settings[ctx.group]
        if exchange.text:
            grad = _arrived_gradient_with_text(under_way, *ctx.shape, list(exchange.lengths), settings)
        else:
            grad = _view(arrived(under_way, "to_shards backward", settings), ctx.shape)
        return None, None, grad.transpose(0, 1)


class _ArrivedShards(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, first: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # the first has a name because torch.compile leaves out ctx where two arguments, as of one group, come by a star
        inputs = first, *others
        ctx.exchange, count = exchange, len(inputs) // 2
        # a compiled graph must not take the memory of what is sent for something else before it is
        under_way, sent = list(inputs[:count]), list(inputs[count:])
        shard, text = _arrived_shards(under_way, sent, *exchange.of_all(exchange.shard_heads))
        return shard, text

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, grad_text: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange = ctx.exchange
        groups = len(exchange.settings)
        # the last group first, as the engine goes on with it
        under_way = [
            _send_gradients_of_shards(grad, grad_text, *exchange.of_group(exchange.shard_heads, group))
            for group in reversed(range(groups))
        ]
        return None, *reversed(under_way), *(None,) * groups


def _view(flat: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Return the first elements of a flat tensor in a shape."""
    _, batch, heads, dim = shape
    view: torch.Tensor = flat.as_strided(shape, (batch * heads * dim, heads * dim, dim, 1))
    return view


def _counts(ranges: tuple[int, ...] | list[int], size: int) -> list[list[int]]:
    """Return for each rank how many heads of each tensor it has."""
    each = [last - first for first, last in zip(ranges[::2], ranges[1::2], strict=True)]
    count = len(each) // size
    return [each[count * peer : count * (peer + 1)] for peer in range(size)]


def _totals(ranges: list[int], size: int) -> list[int]:
    """Return for each rank how many heads of all tensors it has."""
    return [sum(of_rank) for of_rank in _counts(ranges, size)]


def _pieces(
    buffer: torch.Tensor, ranges: list[int], size: int, rows: int, batch: int, dim: int
) -> list[tuple[int, tuple[int, int], torch.Tensor]]:
    """Return what a buffer holds that has for each rank `[rows, B, its heads of all tensors, D]`.

    Returns:
        For each part the number of its tensor, the first of its heads and the one after the last, and `[B, rows, h, D]`.
    """
    counts = _counts(ranges, size)
    pieces, number = [], 0
    blocks = torch.split(buffer, [rows * batch * sum(of_rank) * dim for of_rank in counts])
    for block, of_rank in zip(blocks, counts, strict=True):
        parts = torch.split(block.view(rows, batch, sum(of_rank), dim), of_rank, dim=2)
        for tensor, part in enumerate(parts):
            pieces.append((tensor, (ranges[number], ranges[number + 1]), part.transpose(0, 1)))
            number += 2
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
def _send_heads(
    tensors: list[torch.Tensor],
    text: list[torch.Tensor],
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    size, length, total = len(lengths), lengths[rank], sum(lengths)
    batch, _, _, dim = tensors[0].shape
    unit, tail = batch * dim, text[0].shape[1] if text else 0
    counts = _totals(ranges, size)
    sent = tensors[0].new_empty(length * unit * sum(counts))
    for tensor, (first, last), part in _pieces(sent, ranges, size, length, batch, dim):
        part.copy_(tensors[tensor][:, :length, first:last])
    result = tensors[0].new_empty(_heads_numel(ranges, lengths, rank, unit, tail))
    begin_all_to_all(
        result[: total * unit * counts[rank]],
        sent,
        [n * unit * counts[rank] for n in lengths],
        [length * unit * n for n in counts],
        "to_heads",
        settings,
        _sizes(lengths, rows, batch, tail),
        waits=waits,
    )
    if text:
        own = _by_group(ranges, size)[rank]
        behind = result[total * unit * counts[rank] :][: tail * unit * counts[rank]]
        for tensor, (first, last), part in _pieces(behind, own, 1, tail, batch, dim):
            part.copy_(text[tensor][:, :, first:last])
    return result


@_send_heads.register_fake
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
def _send_gradients_of_heads(
    grads: list[torch.Tensor],
    tail: int,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    size, length, total = len(lengths), lengths[rank], sum(lengths)
    batch, _, _, dim = grads[0].shape
    unit, counts, own = batch * dim, _totals(ranges, size), _by_group(ranges, size)[rank]
    sent = grads[0].new_empty(total * unit * counts[rank])
    for tensor, _, part in _pieces(sent, own, 1, total, batch, dim):
        part.copy_(grads[tensor][:, :total])
    result = grads[0].new_empty(_heads_numel(ranges, lengths, rank, unit, tail))
    begin_all_to_all(
        result[: length * unit * sum(counts)],
        sent,
        [length * unit * n for n in counts],
        [n * unit * counts[rank] for n in lengths],
        "to_heads backward",
        settings,
        _sizes(lengths, rows, batch, tail),
        waits=waits,
    )
    behind = result[length * unit * sum(counts) :][: tail * unit * counts[rank]]
    for tensor, _, part in _pieces(behind, own, 1, tail, batch, dim):
        part.copy_(grads[tensor][:, total:])
    return result


@_send_gradients_of_heads.register_fake
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
def _arrived_gradients_of_heads(
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
    size, length, unit = len(lengths), lengths[rank], batch * dim
    grads = [under_way[0].new_empty(batch, held, n, dim) for n in heads]
    for x in grads:
        x[:, length:] = 0
    text = [under_way[0].new_zeros(batch, tail, n, dim) for n in heads]
    written = set()
    # the order in which they were sent
    for flat, of_group in reversed(list(zip(under_way, _by_group(ranges, len(under_way)), strict=True))):
        arrived(flat, "to_heads backward", settings)
        counts = _totals(of_group, size)
        end = length * unit * sum(counts)
        for tensor, (first, last), part in _pieces(flat[:end], of_group, size, length, batch, dim):
            grad = grads[tensor][:, :length, first:last]
            if (tensor, first) in written:
                # a key head that went to several ranks gets the sum of what they return, in rank order
                grad += part
            elif first < last:
                grad.copy_(part)
                written.add((tensor, first))
        behind, own = flat[end:][: tail * unit * counts[rank]], _by_group(of_group, size)[rank]
        for tensor, (first, last), part in _pieces(behind, own, 1, tail, batch, dim):
            text[tensor][:, :, first:last] = part
    return grads + text


@_arrived_gradients_of_heads.register_fake
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
def _send_shards(
    x: torch.Tensor,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
    waits: bool,
) -> torch.Tensor:
    batch, long, own, dim = x.shape
    total, length, unit = sum(lengths), lengths[rank], batch * dim
    tail = long - total
    counts = _totals(ranges, len(lengths))
    flat = x.transpose(0, 1)  # [S + T, B, h, D]
    if tail:
        parts = torch.split(flat[:total], lengths)
        sent = torch.cat([piece for part in parts for piece in (part, flat[total:])])
    else:
        sent = flat.contiguous()
    result = x.new_empty(_shards_numel(ranges, lengths, rank, unit, tail))
    begin_all_to_all(
        result[: (length + tail) * unit * sum(counts)],
        sent.view(-1),
        [(length + tail) * unit * n for n in counts],
        [(n + tail) * unit * own for n in lengths],
        "to_shards",
        settings,
        _sizes(lengths, rows, batch, tail),
        waits=waits,
    )
    return result


@_send_shards.register_fake
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
def _arrived_shards(
    under_way: list[torch.Tensor],
    sent: list[torch.Tensor],
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, long, _, dim = sent[0].shape
    size, length, tail = len(lengths), lengths[rank], long - sum(lengths)
    heads = sum(_totals(ranges, len(ranges) // 2))
    shard = sent[0].new_empty(batch, rows[rank], heads, dim)
    shard[:, length:] = 0
    text = sent[0].new_empty(batch, tail, heads, dim)
    for flat, of_group in zip(under_way, _by_group(ranges, len(under_way)), strict=True):
        arrived(flat, "to_shards", settings)
        end = (length + tail) * batch * dim * sum(_totals(of_group, size))
        for _, (first, last), part in _pieces(flat[:end], of_group, size, length + tail, batch, dim):
            shard[:, :length, first:last] = part[:, :length]
            text[:, :, first:last] = part[:, length:]
    return shard, text


@_arrived_shards.register_fake
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
def _send_gradients_of_shards(
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
    size, length, unit, counts = len(lengths), lengths[rank], batch * dim, _totals(ranges, len(lengths))
    sent = grad.new_empty((length + tail) * unit * sum(counts))
    for _, (first, last), part in _pieces(sent, ranges, size, length + tail, batch, dim):
        part[:, :length] = grad[:, :length, first:last]
        part[:, length:] = grad_text[:, :, first:last]
    result = grad.new_empty(_shards_numel(ranges, lengths, rank, unit, tail))
    begin_all_to_all(
        result[: (sum(lengths) + size * tail) * unit * counts[rank]],
        sent,
        [(n + tail) * unit * counts[rank] for n in lengths],
        [(length + tail) * unit * n for n in counts],
        "to_shards backward",
        settings,
        _sizes(lengths, rows, batch, tail),
        waits=waits,
    )
    return result


@_send_gradients_of_shards.register_fake
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
def _arrived_gradient_with_text(
    under_way: torch.Tensor, long: int, batch: int, own: int, dim: int, lengths: list[int], settings: str
) -> torch.Tensor:
    total, unit = sum(lengths), batch * own * dim
    tail = long - total
    arrived(under_way, "to_shards backward", settings)
    result = under_way.new_zeros(long, batch, own, dim)
    token, at = 0, 0
    for n in lengths:
        view = under_way[at : at + (n + tail) * unit].view(n + tail, batch, own, dim)
        result[token : token + n] = view[:n]
        # every rank returned the text, so its gradient is the sum of theirs, in rank order
        result[total:] += view[n:]
        token, at = token + n, at + (n + tail) * unit
    return result


@_arrived_gradient_with_text.register_fake
def _(
    under_way: torch.Tensor, long: int, batch: int, own: int, dim: int, lengths: list[int], settings: str
) -> torch.Tensor:
    return under_way.new_empty(long, batch, own, dim)
