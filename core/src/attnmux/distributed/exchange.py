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

from attnmux.distributed import exchange_ops as ops
from attnmux.distributed.collective import add_fields, arrived, taken

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
        trains: Whether backward may follow.
    """

    heads: tuple[tuple[int, ...], ...]
    shard_heads: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    rank: int
    settings: tuple[str, ...]
    text: int
    trains: bool

    @classmethod
    def of(
        cls,
        groups: tuple[HeadPlan, ...],
        tensors: str,
        plan: SeqPlan,
        rank: int,
        settings: str,
        *,
        text: int = 0,
        trains: bool = True,
    ) -> Exchange:
        """Return the exchange among the ranks of a plan.

        Args:
            groups: Which heads each rank attends with, group by group.
            tensors: A letter for each tensor: "q" if it has as many heads as q, "k" if as k.
            plan: Where the tokens are.
            rank: This rank.
            settings: From `describe`.
            text: Tokens that every rank holds.
            trains: Whether backward may follow.
        """
        heads = []
        for group in groups:
            of_tensor = [group.q if letter == "q" else group.kv for letter in tensors]
            heads.append(
                tuple(bound for of_ranks in zip(*of_tensor, strict=True) for pair in of_ranks for bound in pair)
            )
        shard_heads = tuple(tuple(bound for pair in group.q for bound in pair) for group in groups)
        numbered = tuple(add_fields(settings, {"overlap_group": number}) for number in range(len(groups)))
        of_group = numbered if len(groups) > 1 else (settings,)
        return cls(tuple(heads), shard_heads, plan.lengths, plan.rows, rank, of_group, text, trains)

    def of_group(self, ranges: tuple[tuple[int, ...], ...], group: int) -> tuple[Any, ...]:
        """Return the last arguments of an operator that sends; with a single group it waits, as there is nothing else to do."""
        return list(ranges[group]), *self._places(), self.settings[group], len(self.settings) == 1

    def of_all(self, ranges: tuple[tuple[int, ...], ...]) -> tuple[Any, ...]:
        """Return the last arguments of an operator that receives."""
        return [bound for of_group in ranges for bound in of_group], *self._places(), self.settings[0]

    def _places(self) -> tuple[Any, ...]:
        return list(self.lengths), list(self.rows), self.rank

    def wait(self, under_way: torch.Tensor, group: int, operation: str) -> torch.Tensor:
        """Return what is under way once it is there."""
        return under_way if len(self.settings) == 1 else arrived(under_way, operation, self.settings[group])


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
        ctx.heads, ctx.count = [x.shape[2] for x in tensors], len(inputs)
        batch, held, _, dim = tensors[0].shape
        _keep(ctx, exchange, (held, exchange.text, batch, dim), tensors[0])
        return tuple(
            ops.send_heads(tensors, text, *exchange.of_group(exchange.heads, group))
            for group in range(len(exchange.settings))
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *under_way: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange, sizes = _kept(ctx)
        grads = ops.arrived_gradients_of_heads(list(under_way), ctx.heads, *sizes, *exchange.of_all(exchange.heads))
        return None, *grads[: ctx.count]


class _ArrivedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, group: int, batch: int, dim: int, under_way: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        _keep(ctx, exchange, (), under_way)
        heads = ops.count_heads(exchange.heads[group], len(exchange.lengths))[exchange.rank]
        shape = sum(exchange.lengths) + exchange.text, batch, sum(heads), dim
        if exchange.trains and len(exchange.settings) > 1 and torch.compiler.is_compiling():
            found = taken(under_way, [], "to_heads", exchange.settings[group])
        else:
            found = exchange.wait(under_way, group, "to_heads")
        buffer = _view(found, shape)
        return tuple(part.transpose(0, 1) for part in torch.split(buffer, heads, dim=2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange, _ = _kept(ctx)
        under_way = ops.send_gradients_of_heads(
            list(grads), exchange.text, *exchange.of_group(exchange.heads, ctx.group)
        )
        return None, None, None, None, under_way


class _SendShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, group: int, x: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        _keep(ctx, exchange, (x.shape[1], x.shape[0], x.shape[2], x.shape[3]), x)
        under_way: torch.Tensor = ops.send_shards(x, *exchange.of_group(exchange.shard_heads, group))
        return under_way

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, under_way: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange, shape = _kept(ctx)
        if exchange.text:
            settings = exchange.settings[ctx.group]
            grad = ops.arrived_gradient_with_text(under_way, *shape, list(exchange.lengths), settings)
        else:
            grad = _view(exchange.wait(under_way, ctx.group, "to_shards backward"), shape)
        return None, None, grad.transpose(0, 1)


class _ArrivedShards(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, first: torch.Tensor, *others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # the first has a name because torch.compile leaves out ctx where two arguments, as of one group, come by a star
        inputs = first, *others
        count = len(inputs) // 2
        _keep(ctx, exchange, (), first)
        # a compiled graph must not take the memory of what is sent for something else before it is
        under_way, sent = list(inputs[:count]), list(inputs[count:])
        shard, text = ops.arrived_shards(under_way, sent, *exchange.of_all(exchange.shard_heads))
        return shard, text

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, grad_text: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange, _ = _kept(ctx)
        groups = len(exchange.settings)
        # the last group first, as the engine goes on with it
        under_way = [
            ops.send_gradients_of_shards(grad, grad_text, *exchange.of_group(exchange.shard_heads, group))
            for group in reversed(range(groups))
        ]
        return None, *reversed(under_way), *(None,) * groups


def _keep(ctx: Any, exchange: Exchange, sizes: tuple[int, ...], like: torch.Tensor) -> None:
    """Keep an exchange, and some sizes, for backward."""
    ctx.exchange, ctx.sizes = exchange, sizes
    if torch.compiler.is_compiling():
        # torch 2.10's dynamo mixes up numbers that backward takes from forward, but not those that a tensor's shape has
        numbers = (*sizes, exchange.text, *exchange.lengths, *exchange.rows)
        chunks = [numbers[first : first + 32] for first in range(0, len(numbers), 32)]
        ctx.save_for_backward(*(like.new_empty((0, *chunk)) for chunk in chunks))


def _kept(ctx: Any) -> tuple[Exchange, tuple[int, ...]]:
    """Return what `_keep` kept."""
    exchange = ctx.exchange
    if not torch.compiler.is_compiling():
        return exchange, ctx.sizes
    ranks, count = len(exchange.lengths), len(ctx.sizes)
    rest = [size for numbers in ctx.saved_tensors for size in numbers.shape[1:]]
    sizes, text, lengths, rows = rest[:count], rest[count], rest[-2 * ranks : -ranks], rest[-ranks:]
    heads, of_shards, settings = exchange.heads, exchange.shard_heads, exchange.settings
    kept = Exchange(heads, of_shards, tuple(lengths), tuple(rows), exchange.rank, settings, text, exchange.trains)
    return kept, tuple(sizes)


def _view(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the first elements of a flat tensor in a shape."""
    _, batch, heads, dim = shape
    view: torch.Tensor = flat.as_strided(shape, (batch * heads * dim, heads * dim, dim, 1))
    return view
