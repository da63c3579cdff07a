"""Every rank gets the keys and values of all, in one all-gather; their gradients come back in one all-to-all."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from attnmux.distributed.collective import all_gather, all_to_all
from attnmux.distributed.words import copy_words

__all__ = ["gather_keys"]


def gather_keys(
    k: torch.Tensor, v: torch.Tensor, text: list[torch.Tensor], lengths: tuple[int, ...], rank: int, settings: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and the values of all ranks' tokens.

    Args:
        k: `[B, L, H_kv, D]`, any strides: this rank's tokens.
        v: Likewise.
        text: `[B, T, H_kv, D]` twice, keys and values that every rank has; or nothing.
        lengths: Tokens of every rank. The all-gather sends the longest of them from every rank.
        rank: This rank.
        settings: From `describe`.

    Returns:
        Two views `[B, S + T, H_kv, D]`, D contiguous, of one buffer; text is last.

    Numerics: gradients are summed over the ranks in rank order, in float32 (float64), and returned in the dtype of k.
    """
    both = _gather(k, v, text, list(lengths), rank, settings)
    return both[:, 0].transpose(0, 1), both[:, 1].transpose(0, 1)


def _sizes(lengths: list[int], batch: int, text: int) -> dict[str, object]:
    return {"lengths": lengths, "batch": batch, "text": text}


@torch.library.custom_op("attnmux::sp_gather", mutates_args=())
def _gather(
    k: torch.Tensor, v: torch.Tensor, text: list[torch.Tensor], lengths: list[int], rank: int, settings: str
) -> torch.Tensor:
    batch, length, heads, dim = k.shape
    total, longest, tail = sum(lengths), max(lengths), text[0].shape[1] if text else 0
    sent = k.new_empty(longest, 2, batch, heads, dim)
    copy_words(sent[:length, 0], k.transpose(0, 1))
    copy_words(sent[:length, 1], v.transpose(0, 1))
    # a short shard is sent with rows that hold anything
    sent[length:] = 0
    result = k.new_empty(total + tail, 2, batch, heads, dim)
    has_gaps = longest * len(lengths) > total
    received = k.new_empty(len(lengths) * longest, 2, batch, heads, dim) if has_gaps else result[:total]
    all_gather(received.view(-1), sent.view(-1), "gather", settings, _sizes(lengths, batch, tail))
    if has_gaps:
        for peer, (end, n) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
            result[end - n : end] = received[peer * longest : peer * longest + n]
    for which, tokens in enumerate(text):
        result[total:, which] = tokens.transpose(0, 1)
    return result


@_gather.register_fake
def _(
    k: torch.Tensor, v: torch.Tensor, text: list[torch.Tensor], lengths: list[int], rank: int, settings: str
) -> torch.Tensor:
    batch, _, heads, dim = k.shape
    return k.new_empty(sum(lengths) + (text[0].shape[1] if text else 0), 2, batch, heads, dim)


@torch.library.custom_op("attnmux::sp_gather_backward", mutates_args=())
def _gather_backward(grad: torch.Tensor, lengths: list[int], rank: int, settings: str) -> torch.Tensor:
    total, unit, length = sum(lengths), grad[0].numel(), lengths[rank]
    received = grad.new_empty(len(lengths), length, *grad.shape[1:])
    all_to_all(
        received.view(-1),
        grad[:total].contiguous().view(-1),
        [length * unit] * len(lengths),
        [n * unit for n in lengths],
        "gather backward",
        settings,
        _sizes(lengths, grad.shape[2], grad.shape[0] - total),
    )
    return received.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


@_gather_backward.register_fake
def _(grad: torch.Tensor, lengths: list[int], rank: int, settings: str) -> torch.Tensor:
    return grad.new_empty(lengths[rank], *grad.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, text, *ctx.rest = inputs
    ctx.has_text = bool(text)


def _grad(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    own = _gather_backward(grad, *ctx.rest)
    tail = grad[sum(ctx.rest[0]) :]
    text = [tail[:, which].transpose(0, 1) for which in range(2)] if ctx.has_text else []
    return own[:, 0].transpose(0, 1), own[:, 1].transpose(0, 1), text, None, None, None


_gather.register_autograd(_grad, setup_context=_setup)
