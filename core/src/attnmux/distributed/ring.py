"""Keys and values go around the ranks, each of which attends with its queries to every shard as it comes by.

Forward sends every rank's keys and values to the next rank `P - 1` times, while attention runs on what is there. Backward
does it again, and the gradients of a shard travel with it, from the rank after its own until they are home; nothing but
the rank's own q, k, v, output and log-sum-exp is kept between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnmux.distributed.collective import Pending, begin_all_to_all, start_all_to_all, taken
from attnmux.distributed.merge import merge_part
from attnmux.distributed.words import copy_words

if TYPE_CHECKING:
    from attnmux.backend import AttentionImpl, AttentionMetadata

__all__ = ["Ring", "ring_attention"]


@dataclass(frozen=True, eq=False)
class Ring:
    """What does not change from call to call.

    Attributes:
        impl: Attends to the rank's own shard.
        other_impl: Attends to other shards: the same, or for causal attention one that is not causal.
        rank: This rank.
        size: Number of ranks.
    """

    impl: AttentionImpl[Any]
    other_impl: AttentionImpl[Any]
    rank: int
    size: int

    def sees(self, lengths: tuple[int, ...], step: int) -> bool:
        """Whether this rank's queries attend to the shard that comes by at a step, from so many ranks before."""
        source = (self.rank - step) % self.size
        return lengths[source] > 0 and (source < self.rank or not self.impl.causal)


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring: Ring,
    metadata: AttentionMetadata | None,
    lengths: tuple[int, ...],
    settings: str,
) -> torch.Tensor:
    """Return this rank's queries' attention to the keys of all ranks.

    Args:
        q: `[B, rows, H, D]`, D contiguous; the rank's tokens, and behind them any others.
        k: `[B, L + T, H_kv, D]`, likewise: the rank's L tokens, which go around, and T that every rank has, which do not.
        v: Like k.
        ring: The ranks and their impl.
        metadata: For the impl.
        lengths: Tokens of every rank.
        settings: From `describe`.

    Returns:
        `[B, rows, H, D]` in the dtype of q.

    Numerics: parts are computed in the dtype of q, under autocast too; merged, and gradients summed, in float32 (float64).
    """
    result: torch.Tensor = _RingAttention.apply(q, k, v, ring, metadata, lengths, settings)  # type: ignore[no-untyped-call]
    return result


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ring: Ring,
        metadata: AttentionMetadata | None,
        lengths: tuple[int, ...],
        settings: str,
    ) -> torch.Tensor:
        length, sizes = lengths[ring.rank], _Sizes(lengths, q.shape[0], k.shape[1] - lengths[ring.rank])
        merged = None
        seen = [step for step in range(1, ring.size) if q.shape[1] and ring.sees(lengths, step)]
        with torch.autocast(q.device.type, enabled=False):
            coming = _shift(_pack(k[:, :length], v[:, :length]), ring, 1, sizes, "ring", settings)
            if q.shape[1] and k.shape[1]:
                merged = merge_part(merged, *ring.impl.attend_part(q, k, v, metadata))
            for step in range(1, ring.size):
                held = coming.wait()
                if step + 1 < ring.size:
                    coming = _shift(held, ring, step + 1, sizes, "ring", settings)
                if step in seen:
                    part = ring.other_impl.attend_part(q, *_unpack(held), metadata)
                    merged = merge_part(merged, *part, dtype=q.dtype if step == seen[-1] else None)
        if merged is None:
            output, lse = q.new_zeros(q.shape), q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"))
        else:
            output, lse = merged
        if torch.compiler.is_compiling():
            # a view, or what was written in place, loses its gradient under torch 2.11's dynamo
            output = output.clone()
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.options = ring, metadata, lengths, settings
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        ring, metadata, lengths, settings = ctx.options
        length, sizes = lengths[ring.rank], _Sizes(lengths, q.shape[0], k.shape[1] - lengths[ring.rank])
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            # after grad, or a compiler would send it in forward, which no backward may follow
            coming = _shift(_pack(k[:, :length], v[:, :length]), ring, 1, sizes, "ring backward", settings, after=grad)
            if q.shape[1] and k.shape[1]:
                grad_q, grad_k, grad_v = ring.impl.part_gradients(grad, q, k, v, output, lse, metadata)
            else:
                grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
            carried = None
            for step in range(1, ring.size):
                held = coming.wait()
                if step + 1 < ring.size:
                    coming = _shift(held, ring, step + 1, sizes, "ring backward", settings)
                if q.shape[1] and ring.sees(lengths, step):
                    part_q, part_k, part_v = ring.other_impl.part_gradients(
                        grad, q, *_unpack(held), output, lse, metadata
                    )
                    grad_q = grad_q.to(dtype) + part_q
                    grads = _pack(part_k, part_v, dtype)
                else:
                    grads = torch.zeros(held.shape, dtype=dtype, device=held.device)
                if carried is not None:
                    grads += carried.wait()
                carried = _shift(grads, ring, step + 1, sizes, "ring gradients", settings)
            if carried is not None:
                home = _unpack(carried.wait())
                grad_k, grad_v = (_with_home(own, x, length) for own, x in zip((grad_k, grad_v), home, strict=True))
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _with_home(own: torch.Tensor, home: torch.Tensor, length: int) -> torch.Tensor:
    """Return a rank's gradient of its keys, and of those behind its shard, with what came home for the shard."""
    total = own.to(home.dtype, copy=True)
    total[:, :length] += home
    return total


@dataclass(frozen=True)
class _Sizes:
    lengths: tuple[int, ...]
    batch: int
    text: int


def _pack(k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return both as one `[L, 2, B, H, D]`."""
    batch, length, heads, dim = k.shape
    packed = k.new_empty(length, 2, batch, heads, dim, dtype=dtype)
    for place, x in enumerate((k, v)):
        if torch.compiler.is_compiling() or packed.dtype != x.dtype:
            packed[:, place] = x.transpose(0, 1)
        else:
            copy_words(packed[:, place], x.transpose(0, 1))
    return packed


def _unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return packed[:, 0].transpose(0, 1), packed[:, 1].transpose(0, 1)


@dataclass(frozen=True)
class _UnderWay:
    received: torch.Tensor
    sent: torch.Tensor
    operation: str
    settings: str

    def wait(self) -> torch.Tensor:
        found: torch.Tensor = taken(self.received, [self.sent], self.operation, self.settings)
        return found


def _shift(
    x: torch.Tensor,
    ring: Ring,
    step: int,
    sizes: _Sizes,
    operation: str,
    settings: str,
    after: torch.Tensor | None = None,
) -> Pending | _UnderWay:
    """Send x to the next rank and receive what the rank before has: the shard from `step` ranks before.

    A compiled graph does it when `after` is known.
    """
    rows = sizes.lengths[(ring.rank - step) % ring.size]
    lengths = list(sizes.lengths)
    if torch.compiler.is_compiling():
        # a compiled graph has no place for torch's handle, which is registered for what is received
        received = _shift_op(x, after, rows, lengths, sizes.text, ring.rank, operation, settings)
        return _UnderWay(received, x, operation, settings)
    received, counts = _shift_buffers(x, rows, ring.rank, ring.size)
    fields: dict[str, object] = {"lengths": lengths, "batch": sizes.batch, "text": sizes.text}
    pending = start_all_to_all(received.view(-1), x.view(-1), *counts, operation, settings, fields)
    return Pending(received, pending.work, pending.failed)


def _shift_buffers(
    x: torch.Tensor, rows: int, rank: int, size: int
) -> tuple[torch.Tensor, tuple[list[int], list[int]]]:
    received = x.new_empty(rows, *x.shape[1:])
    elements_in, elements_out = [0] * size, [0] * size
    elements_in[(rank - 1) % size], elements_out[(rank + 1) % size] = received.numel(), x.numel()
    return received, (elements_in, elements_out)


@torch.library.custom_op("attnmux::sp_shift", mutates_args=())
def _shift_op(
    x: torch.Tensor,
    after: torch.Tensor | None,
    rows: int,
    lengths: list[int],
    text: int,
    rank: int,
    operation: str,
    settings: str,
) -> torch.Tensor:
    received, counts = _shift_buffers(x, rows, rank, len(lengths))
    fields: dict[str, object] = {"lengths": lengths, "batch": x.shape[2], "text": text}
    begin_all_to_all(received.view(-1), x.contiguous().view(-1), *counts, operation, settings, fields, waits=False)
    return received


@_shift_op.register_fake
def _(
    x: torch.Tensor,
    after: torch.Tensor | None,
    rows: int,
    lengths: list[int],
    text: int,
    rank: int,
    operation: str,
    settings: str,
) -> torch.Tensor:
    return x.new_empty(rows, *x.shape[1:])
