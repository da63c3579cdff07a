"""Tokens for heads in one all-to-all, and back in one.

`to_heads` turns shards that hold some tokens and all heads into tensors that hold all tokens and some heads; `to_shards`
is the way back. Several tensors travel in one buffer `[S, B, heads of all tensors, D]`, in which every rank's part is one
block: what arrives needs no rearranging, each tensor is a strided view of it. Tokens that all ranks hold (text) are
written behind the sequence, and on the way back every rank sends all others its heads of them in the same all-to-all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnmux.distributed.collective import all_to_all

if TYPE_CHECKING:
    from attnmux.distributed.plan import Range, SeqPlan

__all__ = ["to_heads", "to_shards"]


def _count(ranges: list[int], tensors: int, peer: int) -> int:
    """Return how many heads of all tensors a rank has; `ranges` holds first, last per rank and tensor."""
    base = 2 * tensors * peer
    return sum(ranges[base + 2 * t + 1] - ranges[base + 2 * t] for t in range(tensors))


def _sizes(lengths: list[int], rows: list[int], batch: int, text: int) -> dict[str, object]:
    """Return the sizes that ranks have to agree on; not part of the settings, which a compiled graph holds as they are."""
    return {"lengths": lengths, "rows": rows, "batch": batch, "text": text}


def _pack_heads(tensors: list[torch.Tensor], ranges: list[int], length: int) -> torch.Tensor:
    """Return the send buffer: for each rank `[length, B, its heads of all tensors, D]`; one pass over the tensors."""
    count = len(tensors)
    size = len(ranges) // (2 * count)
    batch, _, _, dim = tensors[0].shape
    heads = [_count(ranges, count, peer) for peer in range(size)]
    buffer = tensors[0].new_empty(length * batch * sum(heads) * dim)
    blocks = torch.split(buffer, [length * batch * n * dim for n in heads])
    for peer, block in enumerate(blocks):
        view, at = block.view(length, batch, heads[peer], dim), 0
        for t, tensor in enumerate(tensors):
            first, last = ranges[2 * (count * peer + t) : 2 * (count * peer + t) + 2]
            view[:, :, at : at + last - first].copy_(tensor[:, :length, first:last].transpose(0, 1))
            at += last - first
    return buffer


@torch.library.custom_op("attnmux::sp_to_heads", mutates_args=())
def _to_heads(
    tensors: list[torch.Tensor],
    text: list[torch.Tensor],
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> torch.Tensor:
    count, size = len(tensors), len(lengths)
    batch, _, _, dim = tensors[0].shape
    own = _count(ranges, count, rank)
    total, tail = sum(lengths), text[0].shape[1] if text else 0
    result = tensors[0].new_empty(total + tail, batch, own, dim)
    sent = _pack_heads(tensors, ranges, lengths[rank])
    unit = batch * dim
    all_to_all(
        result[:total].view(-1),
        sent,
        [lengths[peer] * unit * own for peer in range(size)],
        [lengths[rank] * unit * _count(ranges, count, peer) for peer in range(size)],
        "to_heads",
        settings,
        _sizes(lengths, rows, batch, tail),
    )
    if text:
        at = 0
        for t, tensor in enumerate(text):
            first, last = ranges[2 * (count * rank + t) : 2 * (count * rank + t) + 2]
            result[total:, :, at : at + last - first].copy_(tensor[:, :, first:last].transpose(0, 1))
            at += last - first
    return result


@_to_heads.register_fake
def _(
    tensors: list[torch.Tensor],
    text: list[torch.Tensor],
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> torch.Tensor:
    tail = text[0].shape[1] if text else 0
    batch, _, _, dim = tensors[0].shape
    return tensors[0].new_empty(sum(lengths) + tail, batch, _count(ranges, len(tensors), rank), dim)


@torch.library.custom_op("attnmux::sp_to_heads_backward", mutates_args=())
def _to_heads_backward(
    grad: torch.Tensor,
    heads: list[int],
    held: int,
    text: bool,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> list[torch.Tensor]:
    count, size = len(heads), len(lengths)
    total, batch, own, dim = sum(lengths), *grad.shape[1:]
    tail = grad.shape[0] - total
    unit, length = batch * dim, lengths[rank]
    counts = [_count(ranges, count, peer) for peer in range(size)]
    received = grad.new_empty(length * unit * sum(counts))
    all_to_all(
        received,
        grad[:total].contiguous().view(-1),
        [length * unit * n for n in counts],
        [lengths[peer] * unit * own for peer in range(size)],
        "to_heads backward",
        settings,
        _sizes(lengths, rows, batch, tail),
    )
    grads = [grad.new_empty(batch, held, n, dim) for n in heads]
    for x in grads:
        x[:, length:] = 0
    done = [0] * count
    for peer, block in enumerate(torch.split(received, [length * unit * n for n in counts])):
        view, at = block.view(length, batch, counts[peer], dim), 0
        for t in range(count):
            first, last = ranges[2 * (count * peer + t) : 2 * (count * peer + t) + 2]
            part = view[:, :, at : at + last - first].transpose(0, 1)
            at += last - first
            if first < done[t]:
                # a key head that went to several ranks gets the sum of what they return, in rank order
                grads[t][:, :length, first:last] += part
            else:
                grads[t][:, :length, first:last] = part
                done[t] = last
    if text:
        at = 0
        for t, n in enumerate(heads):
            first, last = ranges[2 * (count * rank + t) : 2 * (count * rank + t) + 2]
            part = grad.new_zeros(batch, grad.shape[0] - total, n, dim)
            part[:, :, first:last] = grad[total:, :, at : at + last - first].transpose(0, 1)
            grads.append(part)
            at += last - first
    return grads


@_to_heads_backward.register_fake
def _(
    grad: torch.Tensor,
    heads: list[int],
    held: int,
    text: bool,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> list[torch.Tensor]:
    total, batch, dim = sum(lengths), grad.shape[1], grad.shape[3]
    grads = [grad.new_empty(batch, held, n, dim) for n in heads]
    return grads + ([grad.new_empty(batch, grad.shape[0] - total, n, dim) for n in heads] if text else [])


def _to_heads_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    tensors, text, *ctx.rest = inputs
    ctx.heads, ctx.held, ctx.text = [x.shape[2] for x in tensors], tensors[0].shape[1], bool(text)


def _to_heads_grad(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grads = _to_heads_backward(grad, ctx.heads, ctx.held, ctx.text, *ctx.rest)
    count = len(ctx.heads)
    return grads[:count], grads[count:], *(None,) * 5


_to_heads.register_autograd(_to_heads_grad, setup_context=_to_heads_setup)


def _head_counts(ranges: list[int]) -> list[int]:
    return [last - first for first, last in zip(ranges[::2], ranges[1::2], strict=True)]


@torch.library.custom_op("attnmux::sp_to_shards", mutates_args=())
def _to_shards(
    x: torch.Tensor, ranges: list[int], lengths: list[int], rows: list[int], rank: int, settings: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, long, own, dim = x.shape
    total, length, unit = sum(lengths), lengths[rank], batch * dim
    tail = long - total
    counts = _head_counts(ranges)
    flat = x.transpose(0, 1)  # [S + T, B, h, D]
    if tail:
        parts = torch.split(flat[:total], lengths)
        sent = torch.cat([piece for part in parts for piece in (part, flat[total:])])
    else:
        sent = flat.contiguous()
    received = x.new_empty((length + tail) * unit * sum(counts))
    all_to_all(
        received,
        sent.view(-1),
        [(length + tail) * unit * n for n in counts],
        [(n + tail) * unit * own for n in lengths],
        "to_shards",
        settings,
        _sizes(lengths, rows, batch, tail),
    )
    shard = x.new_empty(batch, rows[rank], sum(counts), dim)
    shard[:, length:] = 0
    text = x.new_empty(batch, tail, sum(counts), dim)
    at = 0
    for n, block in zip(counts, torch.split(received, [(length + tail) * unit * n for n in counts]), strict=True):
        view = block.view(length + tail, batch, n, dim).transpose(0, 1)
        shard[:, :length, at : at + n] = view[:, :length]
        text[:, :, at : at + n] = view[:, length:]
        at += n
    return shard, text


@_to_shards.register_fake
def _(
    x: torch.Tensor, ranges: list[int], lengths: list[int], rows: list[int], rank: int, settings: str
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = sum(_head_counts(ranges))
    return (
        x.new_empty(x.shape[0], rows[rank], heads, x.shape[3]),
        x.new_empty(x.shape[0], x.shape[1] - sum(lengths), heads, x.shape[3]),
    )


@torch.library.custom_op("attnmux::sp_to_shards_backward", mutates_args=())
def _to_shards_backward(
    grad: torch.Tensor,
    grad_text: torch.Tensor,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> torch.Tensor:
    batch, tail, _, dim = grad_text.shape
    total, length, unit = sum(lengths), lengths[rank], batch * dim
    counts = _head_counts(ranges)
    own = counts[rank]
    sent = grad.new_empty((length + tail) * unit * sum(counts))
    at = 0
    for n, block in zip(counts, torch.split(sent, [(length + tail) * unit * n for n in counts]), strict=True):
        view = block.view(length + tail, batch, n, dim)
        view[:length] = grad[:, :length, at : at + n].transpose(0, 1)
        view[length:] = grad_text[:, :, at : at + n].transpose(0, 1)
        at += n
    received = grad.new_empty((total + len(lengths) * tail) * unit * own)
    all_to_all(
        received,
        sent,
        [(n + tail) * unit * own for n in lengths],
        [(length + tail) * unit * n for n in counts],
        "to_shards backward",
        settings,
        _sizes(lengths, rows, batch, tail),
    )
    if not tail:
        return received.view(total, batch, own, dim)
    result = grad.new_zeros(total + tail, batch, own, dim)
    at = 0
    for n, block in zip(lengths, torch.split(received, [(n + tail) * unit * own for n in lengths]), strict=True):
        view = block.view(n + tail, batch, own, dim)
        result[at : at + n] = view[:n]
        # every rank returned the text, so its gradient is the sum of theirs, in rank order
        result[total:] += view[n:]
        at += n
    return result


@_to_shards_backward.register_fake
def _(
    grad: torch.Tensor,
    grad_text: torch.Tensor,
    ranges: list[int],
    lengths: list[int],
    rows: list[int],
    rank: int,
    settings: str,
) -> torch.Tensor:
    batch, tail, _, dim = grad_text.shape
    return grad.new_empty(sum(lengths) + tail, batch, _head_counts(ranges)[rank], dim)


def _to_shards_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, *ctx.rest = inputs


def _to_shards_grad(ctx: Any, grad: torch.Tensor, grad_text: torch.Tensor) -> tuple[Any, ...]:
    return _to_shards_backward(grad, grad_text, *ctx.rest).transpose(0, 1), *(None,) * 5


_to_shards.register_autograd(_to_shards_grad, setup_context=_to_shards_setup)


def to_heads(
    tensors: list[torch.Tensor],
    text: list[torch.Tensor],
    heads: list[tuple[Range, ...]],
    plan: SeqPlan,
    rank: int,
    settings: str,
) -> list[torch.Tensor]:
    """Return for each tensor all tokens of this rank's heads.

    Args:
        tensors: Each `[B, rows, H_t, D]`, any strides; rows of padding are not sent.
        text: As many `[B, T, H_t, D]`, the same on every rank; or none.
        heads: For each tensor the head range of each rank.
        plan: Where the tokens are.
        rank: This rank.
        settings: From `describe`.

    Returns:
        For each tensor a view `[B, S + T, h_t, D]`, D contiguous, of one buffer.
    """
    ranges = [bound for peer in range(len(plan.lengths)) for of_tensor in heads for bound in of_tensor[peer]]
    buffer = _to_heads(tensors, text, ranges, list(plan.lengths), list(plan.rows), rank, settings)
    sizes = [of_tensor[rank][1] - of_tensor[rank][0] for of_tensor in heads]
    return [part.transpose(0, 1) for part in torch.split(buffer, sizes, dim=2)]


def to_shards(
    x: torch.Tensor, heads: tuple[Range, ...], plan: SeqPlan, rank: int, settings: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's tokens of all heads, and the text of all heads.

    Args:
        x: `[B, S + T, h, D]`: this rank's heads of every token, text last; any strides.
        heads: The head range of each rank.
        plan: Where the tokens go.
        rank: This rank.
        settings: From `describe`.

    Returns:
        `[B, rows, H, D]`, zeros in rows of padding, and `[B, T, H, D]`.
    """
    ranges = [bound for of_rank in heads for bound in of_rank]
    shard, text = _to_shards(x, ranges, list(plan.lengths), list(plan.rows), rank, settings)
    return shard, text
