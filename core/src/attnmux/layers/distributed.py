"""Attention over a sequence that several ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnmux.distributed.collective import add_fields, describe
from attnmux.distributed.exchange import Exchange, arrived_heads, arrived_shards, send_heads, send_shards
from attnmux.distributed.gather import gather_keys
from attnmux.distributed.group import SPGroup, as_sp_group
from attnmux.distributed.plan import HeadPlan, SeqPlan
from attnmux.distributed.ring import Ring, ring_attention
from attnmux.errors import UnsupportedRequestError
from attnmux.layers.base import AttentionLayer
from attnmux.rotary import apply_rotary
from attnmux.spec import SP_STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self

    from attnmux.backend import AttentionImpl, AttentionMetadata
    from attnmux.spec import AttentionBackendEnum

__all__ = ["DistributedAttention", "DistributedAttention_VSA"]

Freqs = tuple[torch.Tensor, torch.Tensor]


def _checked_strategy(strategy: str | None, sp: SPGroup) -> str:
    """Return the strategy, by default the one that the group is made for."""
    if strategy is None:
        return "ulysses" if sp.ring is None else "usp"
    if strategy not in SP_STRATEGIES:
        raise UnsupportedRequestError(f"strategy {strategy!r} is unknown; there are {', '.join(SP_STRATEGIES)}")
    if strategy == "usp" and sp.size > 1 and sp.ring is None:
        raise UnsupportedRequestError(
            "strategy 'usp' is ulysses within and a ring across groups of ranks, and this group is not divided: make it by "
            "init_sequence_parallel(ulysses=...), SPGroup.from_groups, or from a mesh of two dimensions (ring, ulysses)"
        )
    if strategy != "usp" and sp.ring is not None:
        raise UnsupportedRequestError(
            f"the group is divided into ring and ulysses, which is for the strategy 'usp', and strategy is {strategy!r}"
        )
    return strategy


def _check_overlap(overlap: int, strategy: str) -> None:
    if not isinstance(overlap, int) or isinstance(overlap, bool) or overlap < 1:
        raise UnsupportedRequestError(f"overlap must be an integer >= 1, got {overlap!r}")
    if overlap > 1 and strategy != "ulysses":
        raise UnsupportedRequestError(
            f"overlap={overlap} divides the exchange of heads of the strategy 'ulysses', not {strategy!r}; leave it out"
        )


def _groups_of(heads: HeadPlan | None, overlap: int) -> tuple[HeadPlan, ...]:
    """Return the heads of all ranks in as many groups; none where no heads are exchanged."""
    if heads is None:
        return ()
    most = max(last - first for first, last in heads.kv)
    if overlap > most:
        raise UnsupportedRequestError(
            f"overlap={overlap} groups of key heads and their queries, and no rank has more key heads than {most}"
        )
    return heads.groups(overlap)


class _SequenceParallel(AttentionLayer):
    """What both layers share: the exchange around the impl. Arguments are those of `DistributedAttention`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        supported_attention_backends: Sequence[AttentionBackendEnum | str] | None = None,
        prefix: str = "",
        *,
        backend: AttentionBackendEnum | str | None = None,
        default_backend: AttentionBackendEnum | str | None = None,
        dtype: torch.dtype | None = None,
        sp_group: SPGroup | ProcessGroup | DeviceMesh | None = None,
        strategy: str | None = None,
        overlap: int = 1,
        **extra_impl_args: Any,
    ) -> None:
        sp = as_sp_group(sp_group)
        strategy = _checked_strategy(strategy, sp)
        _check_overlap(overlap, strategy)
        # which ranks exchange tokens for heads, and which have other keys than these
        inner = {"ulysses": sp, "usp": sp.ulysses}.get(strategy) or SPGroup.local()
        outer = {"usp": sp.ring, "ring": sp, "allgather_kv": sp}.get(strategy) or SPGroup.local()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        own: tuple[int, int | None] = (num_heads, num_kv_heads)
        # heads that make no plan are refused by the impl
        heads = None
        if inner.size > 1 and kv_heads >= 1 and num_heads >= 1 and num_heads % kv_heads == 0:
            heads = HeadPlan.of(num_heads, kv_heads, inner.size)
            first, last = heads.q[inner.rank]
            # a rank without heads never calls its impl, which exists for its parameters
            own = (max(last - first, 1), max(heads.kv[inner.rank][1] - heads.kv[inner.rank][0], 1))
        super().__init__(
            num_heads,
            head_size,
            num_kv_heads,
            softmax_scale,
            causal,
            supported_attention_backends,
            backend=backend,
            default_backend=default_backend,
            dtype=dtype,
            prefix=prefix,
            impl_heads=own,
            sp_size=sp.size,
            sp_strategy=strategy,
            impl_args=extra_impl_args,
        )
        self.sp = sp
        self.strategy = strategy
        self.overlap = overlap
        self._inner, self._outer = inner, outer
        self._head_groups = _groups_of(heads, overlap)
        # in a tuple, so that parameters are in the state once, as those of attn_impl
        self._group_impls: tuple[AttentionImpl[Any], ...] = ()
        if heads is not None:
            self.attn_impl.set_head_range(*heads.q[inner.rank], total=num_heads)
            if overlap > 1:
                ranges = [group.q[inner.rank] for group in self._head_groups]
                self._group_impls = tuple(self.attn_impl.of_heads(*own) for own in ranges if own[0] < own[1])
        # here and not in forward: a compiler may take a float attribute for a variable, which has no text
        fixed = {
            "backend": self.backend_name,
            "strategy": strategy,
            "heads": [num_heads, self.num_kv_heads, head_size],
            "causal": causal,
            "softmax_scale": float(self.attn_impl.softmax_scale),
            "overlap": overlap,
        }
        self._settings = tuple(describe(group, fixed) for group in (inner, outer))
        self._ring: Ring | None = None
        if outer.size == 1:
            return
        if self._preprocesses or self._postprocesses:
            raise UnsupportedRequestError(
                f"{self.backend_name} rearranges the whole sequence, of which {strategy!r} shows it a part at a time; use 'ulysses'"
            )
        if strategy != "allgather_kv":
            other = self.attn_impl
            if causal:
                # a query sees all of an earlier shard
                if self.selection.spec.capabilities.trainable_parameters:
                    raise UnsupportedRequestError(
                        f"{self.backend_name} has parameters, and causal {strategy!r} takes two impls, which would have one set "
                        "each; use 'ulysses'"
                    )
                other = type(self.attn_impl)(
                    num_heads=own[0],
                    head_size=head_size,
                    softmax_scale=softmax_scale,
                    causal=False,
                    num_kv_heads=own[1],
                    prefix=prefix,
                    **extra_impl_args,
                )
                if heads is not None:
                    other.set_head_range(*heads.q[inner.rank], total=num_heads)
            self._ring = Ring(self.attn_impl, other, outer.rank, outer.size)

    def train(self, mode: bool = True) -> Self:
        """Set whether the layer trains, the impls of its groups of heads included."""
        for impl in self._group_impls:
            if isinstance(impl, torch.nn.Module):
                impl.train(mode)
        return super().train(mode)

    def _plan(self, rows: int, original_seq_len: int | None, plan: SeqPlan | None) -> SeqPlan:
        if plan is None:
            length = rows * self.sp.size if original_seq_len is None else original_seq_len
            return SeqPlan.padded(length, rows, self.sp.size)
        if original_seq_len is not None and original_seq_len != plan.length:
            raise UnsupportedRequestError(f"original_seq_len={original_seq_len}, but the plan has {plan.length} tokens")
        if len(plan.rows) != self.sp.size or plan.rows[self.sp.rank] != rows:
            raise UnsupportedRequestError(
                f"the plan is for {len(plan.rows)} ranks with {plan.rows} rows; this is rank {self.sp.rank} of "
                f"{self.sp.size} with {rows} rows"
            )
        return plan

    def _run(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        plan: SeqPlan,
        text: tuple[torch.Tensor, ...],
        freqs_cis: Freqs | None,
        attn_metadata: AttentionMetadata | None,
        extra: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        metadata = self._metadata(attn_metadata)
        if self._outer.size > 1:
            self._check_parts(metadata, text, extra)
        rank, rows, length = self.sp.rank, plan.rows[self.sp.rank], plan.lengths[self.sp.rank]
        q, k, v = qkv
        if freqs_cis is not None or not self._head_groups:
            if length < rows:
                q, k, v = (x[:, :length] for x in (q, k, v))
                extra = {name: x[:, :length] for name, x in extra.items()}
            if freqs_cis is not None:
                first, last = plan.range_of(rank)
                self._check_freqs(freqs_cis, plan.length)
                freqs = freqs_cis if self.sp.size == 1 else (freqs_cis[0][first:last], freqs_cis[1][first:last])
                q, k = apply_rotary(q, freqs), apply_rotary(k, freqs)
        if self.sp.size == 1:
            output, text_output = self._attend(self.attn_impl, q, k, v, text, metadata, extra)
            return _padded(output, rows), text_output

        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *extra.values(), *text))
        of_call = {"extra_inputs": sorted(extra), "rotary": freqs_cis is not None, "grad": needs_grad}
        near_settings, far_settings = (add_fields(settings, of_call) for settings in self._settings)
        if not self._head_groups:
            output = self._attend_across((q, k, v), text, metadata, plan.lengths, far_settings)
            return _padded(output[:, :length], rows), output[:, length:] if text else None

        near = plan.part(rank - self._inner.rank, rank - self._inner.rank + self._inner.size)
        tail, letters = text[0].shape[1] if text else 0, "qkk" + "q" * len(extra)
        # the impl's parameters may want gradients though no input does
        trains = torch.is_grad_enabled()
        exchange = Exchange.of(
            self._head_groups, letters, near, self._inner.rank, near_settings, text=tail, trains=trains
        )
        attended, back = [], []
        for group, under_way in enumerate(send_heads(exchange, [q, k, v, *extra.values()], list(text))):
            own = arrived_heads(exchange, group, under_way, q.shape[0], self.head_size)
            impl = self._group_impls[group] if group < len(self._group_impls) else self.attn_impl
            attended.append(self._attend_to_all(impl, own, list(extra), near.length, plan, metadata, far_settings))
            back.append(send_shards(exchange, group, attended[-1]))
        shard, text_output = arrived_shards(exchange, back, attended)
        return shard, text_output if text else None

    def _attend_to_all(
        self,
        impl: AttentionImpl[Any],
        tensors: tuple[torch.Tensor, ...],
        extra: list[str],
        total: int,
        plan: SeqPlan,
        metadata: AttentionMetadata | None,
        far_settings: str,
    ) -> torch.Tensor:
        """Return what some of this rank's heads attend to over `total` tokens, text behind them, and other ranks' keys."""
        q, k, v, *rest = tensors
        if not q.shape[2]:
            # no head of its own: the empty q keeps the exchange in the graph, whose backward other ranks wait for
            return q
        if self._ring is not None:
            size = self._inner.size
            lengths = tuple(sum(plan.lengths[first : first + size]) for first in range(0, self.sp.size, size))
            return ring_attention(q, k, v, self._ring, metadata, lengths, far_settings)
        gates = dict(zip(extra, rest, strict=True))
        if q.shape[1] > total and self._preprocesses:
            text = tuple(x[:, total:] for x in (q, k, v))
            q, k, v = (x[:, :total] for x in (q, k, v))
            video, text_output = self._attend(impl, q, k, v, text, metadata, gates)
            assert text_output is not None
            return torch.cat((video, text_output), dim=1)
        return self._attend(impl, q, k, v, (), metadata, gates)[0]

    def _attend_across(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        text: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata | None,
        lengths: tuple[int, ...],
        settings: str,
    ) -> torch.Tensor:
        """Return what this rank's tokens, with all heads and text behind them, get from the keys of every rank."""
        q, k, v = qkv
        rank = self._outer.rank
        if text:
            q = torch.cat((q, text[0]), dim=1)
        if self._ring is not None:
            if text:
                k, v = torch.cat((k, text[1]), dim=1), torch.cat((v, text[2]), dim=1)
            return ring_attention(q, k, v, self._ring, metadata, lengths, settings)
        k, v = gather_keys(k, v, list(text[1:]), lengths, rank, settings)
        if not q.shape[1]:
            # no query of its own: as empty as q, but in the graph, whose backward other ranks wait for
            return q + k[:, :0, :1]
        if self.attn_impl.causal:
            # the rank's last query sees no key behind its own
            end = sum(lengths[: rank + 1])
            k, v = k[:, :end], v[:, :end]
        return self.attn_impl.forward(q, k, v, metadata)

    def _check_parts(
        self, metadata: AttentionMetadata | None, text: tuple[torch.Tensor, ...], extra: dict[str, torch.Tensor]
    ) -> None:
        """Refuse what says something of the whole sequence to an impl that sees a part of it at a time."""
        if extra:
            raise UnsupportedRequestError(f"{', '.join(extra)} goes with the strategy 'ulysses', not {self.strategy!r}")
        if text and self.attn_impl.causal:
            raise UnsupportedRequestError(
                f"replicated tokens of a causal layer go with the strategy 'ulysses', not {self.strategy!r}: they see keys of "
                "all ranks, and each rank's own only up to their place"
            )
        given = metadata.asdict_zerocopy({"current_timestep"}) if metadata is not None else {}
        described = sorted(name for name, value in given.items() if value is not None)
        if described:
            raise UnsupportedRequestError(
                f"{self.backend_name}: {', '.join(described)} of the metadata describes the whole sequence, of which "
                f"{self.strategy!r} shows the backend a part at a time; use 'ulysses'"
            )

    def _attend(
        self,
        impl: AttentionImpl[Any],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        text: tuple[torch.Tensor, ...],
        metadata: AttentionMetadata | None,
        extra: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the impl on all tokens, text behind the sequence after `preprocess_qkv`."""
        if self._preprocesses:
            q, k, v = (impl.preprocess_qkv(x, metadata) for x in (q, k, v))
        length = q.shape[1]
        if text:
            q, k, v = (torch.cat((x, tail), dim=1) for x, tail in zip((q, k, v), text, strict=True))
        output = impl.forward(q, k, v, metadata, **extra)
        text_output = None
        if text:
            output, text_output = output[:, :length], output[:, length:]
        return (impl.postprocess_output(output, metadata) if self._postprocesses else output), text_output

    def _check_freqs(self, freqs_cis: Freqs, length: int) -> None:
        if not isinstance(freqs_cis, (tuple, list)) or len(freqs_cis) != 2:
            raise UnsupportedRequestError(f"freqs_cis must be the pair (cos, sin), got {type(freqs_cis).__name__}")
        for name, table in zip(("cos", "sin"), freqs_cis, strict=True):
            if table.shape[0] != length:
                raise UnsupportedRequestError(
                    f"freqs_cis {name} must cover the whole sequence of {length} tokens, got {list(table.shape)}"
                )

    def _check_shards(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, original_seq_len: int | None) -> None:
        self._check(q, k, v)
        if original_seq_len is not None and original_seq_len < 1:
            raise UnsupportedRequestError(f"original_seq_len must be >= 1 or None, got {original_seq_len}")
        if k.shape[1] != q.shape[1]:
            raise UnsupportedRequestError(
                f"q has {q.shape[1]} rows and k {k.shape[1]}: one sequence is shared; keys that every rank holds need no "
                "exchange: use LocalAttention"
            )


def _padded(output: torch.Tensor, rows: int) -> torch.Tensor:
    length = output.shape[1]
    return torch.nn.functional.pad(output, (0, 0, 0, 0, 0, rows - length)) if length < rows else output


class DistributedAttention(_SequenceParallel):
    """Attention over a sequence that is split over the ranks of a group; with one rank the same as `LocalAttention`.

    Each rank passes its tokens of all heads and gets the output for its tokens. By "ulysses" that takes two all-to-alls forward
    and two backward. Any number of heads and tokens can be split. Every rank has to make the same calls.

    Gradients are those of the sum of all ranks' losses; the mean over ranks of a parameter's gradient is the gradient of the
    mean of the losses. That holds for the impl's own parameters and for whatever made the replicated tokens. A rank
    without heads (more ranks than query heads) never runs its impl, whose parameters then have no gradient there.

    Args:
        num_heads: Query heads, >= 1.
        head_size: Channels of one head, >= 1.
        num_kv_heads: Key and value heads, a divisor of `num_heads`; None = `num_heads`.
        softmax_scale: Factor on the scores; None = `head_size ** -0.5`; 0.0 is a value.
        causal: Whether a query sees only keys up to its own position.
        supported_attention_backends: Backends this layer allows; None = every one.
        prefix: Name of the layer in its model.
        backend: Explicit choice, by member or name.
        default_backend: Preference of the layer's author, which users override.
        dtype: Of q, k and v, for the selection; None = torch's default dtype.
        sp_group: The ranks; None = what `init_sequence_parallel` or `use_sp` set, else this process alone.
        strategy: How the ranks share the work; the backend has to declare it. "ulysses": each attends with some heads to all
            tokens. "ring": each attends with its tokens and all heads to every shard of keys as it comes by. "usp": ulysses
            within groups of ranks, a ring across them. "allgather_kv": each has all keys. None = "usp" for a group that is
            divided for it, else "ulysses".
        overlap: For "ulysses": in how many groups, each of at least one key head of some rank, a rank's heads are exchanged and
            attended to, so that the next group comes and the last goes back meanwhile. Two collectives for each.
        **extra_impl_args: Arguments of the backend's own.

    Attributes:
        sp: The group.
        strategy: The strategy.
        overlap: Number of groups of heads.

    Raises:
        AttnmuxError: The selection failed, the strategy does not go with the group or the backend, or the backend refuses an
            argument.
    """

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        original_seq_len: int | None = None,
        replicated_q: torch.Tensor | None = None,
        replicated_k: torch.Tensor | None = None,
        replicated_v: torch.Tensor | None = None,
        freqs_cis: Freqs | None = None,
        *,
        attn_metadata: AttentionMetadata | None = None,
        plan: SeqPlan | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output for this rank's tokens and the one for the replicated tokens.

        Args:
            q: `[B, rows, H, D]`, this rank's shard, D contiguous.
            k: `[B, rows, H_kv, D]`, likewise.
            v: `[B, rows, H_kv, D]`, likewise.
            original_seq_len: Tokens of the whole sequence, >= 1; the rows beyond, at the end of the last shards, are padding.
                None = no padding. Every rank then has equally many rows.
            replicated_q: `[B, T, H, D]`, tokens that every rank holds, behind the sequence; None = none.
            replicated_k: `[B, T, H_kv, D]`, likewise.
            replicated_v: `[B, T, H_kv, D]`, likewise.
            freqs_cis: (cos, sin) of the whole sequence, each `[S, D/2]` or `[S, D]`, for q and k but not the replicated ones.
            attn_metadata: Metadata of this pass; None = the forward context's.
            plan: Where the tokens are, for shards of different sizes.

        Returns:
            `[B, rows, H, D]`, zeros in rows of padding, and `[B, T, H, D]` or None.

        Raises:
            UnsupportedRequestError: An argument that does not fit; names it.
            SequenceParallelError: Ranks disagree, or one did not come.
        """
        self._check_shards(q, k, v, original_seq_len)
        seq_plan = self._plan(q.shape[1], original_seq_len, plan)
        return self._run(
            (q, k, v), seq_plan, self._text(q, replicated_q, replicated_k, replicated_v), freqs_cis, attn_metadata, {}
        )

    def _text(self, q: torch.Tensor, *text: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        given = tuple(x for x in text if x is not None)
        if not given:
            return ()
        if len(given) != len(text):
            raise UnsupportedRequestError(
                "replicated_q, replicated_k and replicated_v come together; one or two are missing"
            )
        self._check(*given)
        if any(x.shape[0] != q.shape[0] or x.shape[1] != given[0].shape[1] for x in given):
            raise UnsupportedRequestError(
                f"replicated tensors must have the batch size {q.shape[0]} and one length, got {[list(x.shape) for x in given]}"
            )
        if given[0].dtype != q.dtype or given[0].device != q.device:
            raise UnsupportedRequestError(
                f"replicated tensors must be {q.dtype} on {q.device} as q is, got {given[0].dtype} on {given[0].device}"
            )
        return given if given[0].shape[1] else ()


class DistributedAttention_VSA(_SequenceParallel):  # noqa: N801 - the contract's name
    """`DistributedAttention` for video sparse attention: the gate of the coarse branch travels with q, k and v."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        original_seq_len: int | None,
        replicated_q: torch.Tensor | None = None,
        replicated_k: torch.Tensor | None = None,
        replicated_v: torch.Tensor | None = None,
        gate_compress: torch.Tensor | None = None,
        freqs_cis: Freqs | None = None,
        *,
        attn_metadata: AttentionMetadata | None = None,
        plan: SeqPlan | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output for this rank's tokens, and None.

        Args:
            q: See `DistributedAttention`; likewise k, v, original_seq_len, freqs_cis, attn_metadata and plan.
            k: See there.
            v: See there.
            original_seq_len: See there.
            replicated_q: Refused, as are replicated_k and replicated_v: tiles are cut from the video alone.
            replicated_k: Refused.
            replicated_v: Refused.
            gate_compress: `[B, rows, H, D]`, factor on the coarse branch; None leaves it out, and nothing is sent for it.
            freqs_cis: See there.
            attn_metadata: See there.
            plan: See there.

        Raises:
            UnsupportedRequestError: An argument that does not fit, or replicated tokens; names it.
            SequenceParallelError: Ranks disagree, or one did not come.
        """
        if replicated_q is not None or replicated_k is not None or replicated_v is not None:
            raise UnsupportedRequestError(
                "DistributedAttention_VSA takes no replicated tokens; use DistributedAttention"
            )
        self._check_shards(q, k, v, original_seq_len)
        seq_plan = self._plan(q.shape[1], original_seq_len, plan)
        extra = {}
        if gate_compress is not None:
            self._checked_extra_inputs({"gate_compress": gate_compress})
            if gate_compress.shape != q.shape or gate_compress.dtype != q.dtype or gate_compress.device != q.device:
                raise UnsupportedRequestError(
                    f"gate_compress must be {list(q.shape)} {q.dtype} on {q.device} as q is, got {list(gate_compress.shape)} "
                    f"{gate_compress.dtype} on {gate_compress.device}"
                )
            extra["gate_compress"] = gate_compress
        return self._run((q, k, v), seq_plan, (), freqs_cis, attn_metadata, extra)
