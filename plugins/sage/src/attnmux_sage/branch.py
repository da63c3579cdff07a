"""The sparse branch of SAGE_SLA_ATTN: quantisation that shares SLA's passes, then attention over the chosen blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from attnmux_sage import reference
from attnmux_sage.kernels import KernelRequest, choose_engine, default_pv, keys_per_step
from attnmux_sage.ops import check_inputs, sage_attention
from attnmux_sage.prepare import KEY_BLOCK, QUERY_TILE, QuantisedTensors, padded_head, quantise
from attnmux_sla.ops import KeySummary, SparseBranch
from attnmux_sla.prepare import pool_blocks

if TYPE_CHECKING:
    from attnmux_blocksparse.index import BlockIndex

__all__ = ["QuantisedBranch"]


class QuantisedBranch(SparseBranch):
    """The sparse branch of one call of SLA in 8 bits.

    Where SLA makes fused passes, q is pooled in the pass that quantises it, and what quantisation has to know of k and v comes
    from SLA's pass over them, so that every tensor is read twice instead of three times.

    Args:
        pv: As for `sage_attention`.
        engine: As for `sage_attention`.
    """

    def __init__(self, pv: str | None, engine: str | None) -> None:
        self.pv = pv
        self.engine = engine
        self._tensors: list[torch.Tensor] | None = None

    def pools_queries(self, feature_map: str) -> bool:
        """Return whether quantisation can go without a pass of its own over k and v: the features must add up to 1."""
        return feature_map == "softmax" and self.engine != "official"

    def pool_queries(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_q: int, softmax_scale: float, keys: KeySummary
    ) -> torch.Tensor:
        """Quantise, and return the means of every 128 rows of q, `[B, H, N_q, D]`, float32."""
        check_inputs(q, k, v)
        assert block_q == QUERY_TILE
        tensors: list[torch.Tensor] = torch.ops.attnmux_sage.quantise_pooling(
            q, k, v, keys.pooled_k, keys.state, keys.range_v, softmax_scale, self.pv or "", self.engine or ""
        )
        self._tensors = tensors[1:]
        return tensors[0]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: BlockIndex, softmax_scale: float
    ) -> torch.Tensor:
        """Return the attention over the chosen blocks, `[B, S_q, H, D]` in the dtype of q."""
        if self._tensors is None:
            out = sage_attention(q, k, v, softmax_scale=softmax_scale, index=index, pv=self.pv, engine=self.engine)
            assert not isinstance(out, tuple)
            return out
        attended: torch.Tensor = torch.ops.attnmux_sage.attend_quantised(
            *self._tensors, v, index.blocks, index.counts, index.even_rows, q.shape[1], self.engine or ""
        )
        return attended


@torch.library.custom_op("attnmux_sage::quantise_pooling", mutates_args=())
def _quantise_pooling_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled_k: torch.Tensor,
    state: torch.Tensor,
    range_v: torch.Tensor,
    softmax_scale: float,
    pv: str,
    engine: str,
) -> list[torch.Tensor]:
    """Return the pooled queries, then the fields of `QuantisedTensors` but for the last, without elements where there is none.

    The 8-bit values are given as int8: e4m3 is unknown to much of what handles the tensors of an operator.
    """
    pv = pv or default_pv(q)
    chosen = choose_engine(engine, KernelRequest(q, k, v, pv, has_lists=True, softmax_scale=softmax_scale))
    if chosen == "reference":
        quantised = quantise(q, k, v, softmax_scale=softmax_scale, fp8_values=pv == "fp8")
        pooled_q = pool_blocks(q, QUERY_TILE)
    else:
        from attnmux_sage.kernels import launch

        quantised, pooled_q = launch.quantise_pooling(
            q, k, v, pooled_k, state, range_v, softmax_scale=softmax_scale, pv=pv
        )
    fields = (quantised.q8, quantised.q_scale, quantised.k8, quantised.k_scale)
    if quantised.v8 is None or quantised.v_scale is None or quantised.v_rest is None:
        return [pooled_q, *fields, *(q.new_empty(0) for _ in range(3))]
    return [pooled_q, *fields, quantised.v8.view(torch.int8), quantised.v_scale, quantised.v_rest]


@_quantise_pooling_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled_k: torch.Tensor,
    state: torch.Tensor,
    range_v: torch.Tensor,
    softmax_scale: float,
    pv: str,
    engine: str,
) -> list[torch.Tensor]:
    batch, len_q, heads, head_dim = q.shape
    heads_k, d_pad = k.shape[2], padded_head(head_dim)
    tiles, blocks_k = -(-len_q // QUERY_TILE), -(-k.shape[1] // KEY_BLOCK)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device=q.device, dtype=dtype)

    values = [q.new_empty(0) for _ in range(3)]
    if (pv or default_pv(q)) == "fp8":
        values = [new(batch, heads_k, blocks_k, d_pad, KEY_BLOCK, dtype=torch.int8)]
        values += [new(batch, heads_k, d_pad), new(batch, heads_k, d_pad)]
    return [
        new(batch, heads, tiles, head_dim),
        new(batch, heads, tiles * QUERY_TILE, d_pad, dtype=torch.int8),
        new(batch, heads, tiles * QUERY_TILE),
        new(batch, heads_k, blocks_k * KEY_BLOCK, d_pad, dtype=torch.int8),
        new(batch, heads_k, blocks_k),
        *values,
    ]


@torch.library.custom_op("attnmux_sage::attend_quantised", mutates_args=())
def _attend_quantised_op(
    q8: torch.Tensor,
    q_scale: torch.Tensor,
    k8: torch.Tensor,
    k_scale: torch.Tensor,
    v8: torch.Tensor,
    v_scale: torch.Tensor,
    v_rest: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    even_rows: bool,
    len_q: int,
    engine: str,
) -> torch.Tensor:
    quantised = QuantisedTensors(q8, q_scale, k8, k_scale, None, None, None, None)
    if v8.numel():
        values = v8.view(torch.float8_e4m3fn)
        quantised = dataclasses.replace(quantised, v8=values, v_scale=v_scale, v_rest=v_rest)
    # Of q only the type is asked for, which is that of v.
    chosen = choose_engine(engine, KernelRequest(v, v, v, "fp8" if v8.numel() else "bf16", has_lists=True))
    if chosen == "reference":
        with torch.autocast(v.device.type, enabled=False):
            step = keys_per_step(v.device, False)
            return reference.attend(quantised, v, len_q=len_q, blocks=blocks, counts=counts, keys_per_step=step)[0]
    from attnmux_sage.kernels import launch

    out = torch.empty(v.shape[0], len_q, q8.shape[1], v.shape[3], device=v.device, dtype=v.dtype)
    launch.launch_attention(chosen, quantised, v, out, None, blocks, counts, even_rows=even_rows)
    return out


@_attend_quantised_op.register_fake
def _(
    q8: torch.Tensor,
    q_scale: torch.Tensor,
    k8: torch.Tensor,
    k_scale: torch.Tensor,
    v8: torch.Tensor,
    v_scale: torch.Tensor,
    v_rest: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    even_rows: bool,
    len_q: int,
    engine: str,
) -> torch.Tensor:
    return torch.empty(v.shape[0], len_q, q8.shape[1], v.shape[3], device=v.device, dtype=v.dtype)
