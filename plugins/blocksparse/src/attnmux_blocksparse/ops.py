"""The operator: checks its arguments, chooses an engine, and is known to autograd, torch.compile and CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import prepare, reference
from attnmux_blocksparse.index import BlockIndex, TransposedLists
from attnmux_blocksparse.kernels import ENGINES, KernelRequest, can_launch, choose_engine
from attnmux_blocksparse.kernels.arguments import IndexTensors


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: BlockIndex,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    engine: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the key blocks that the index lists for every query block.

    Args:
        q: [B, S_q, H, D]. Floating point; bfloat16 or float16 for the GPU engines. Any strides with D contiguous.
        k: [B, S_k, H_kv, D], type and device of q, likewise strided; H_kv divides H, and query head h reads key head
            h // (H / H_kv).
        v: like k.
        index: lists for ceil(S_q / block_q) query and ceil(S_k / block_k) key blocks, on the device of q.
        softmax_scale: factor on q . k, any number; None is D ** -0.5.
        return_lse: also return the log-sum-exp of the scaled scores.
        engine: "reference", "triton" (sm80 on), "hopper" (sm90) or "fa4" (sm90, flash-attn 4 installed, key blocks of 128;
            its gradients differ in the last bits from run to run). None takes the fastest deterministic one that serves
            the call. A named engine runs or raises; it never falls back.

    Returns:
        out [B, S_q, H, D], contiguous, in the type of q; with return_lse also lse [B, H, S_q], float32, natural log. A query
        row with nothing to attend (an empty list, only empty key blocks, or beyond the valid length of its block) has
        output 0, LSE -inf and no gradient. Both outputs are differentiable.

    Raises:
        UnsupportedRequestError: shapes, types, devices or strides that do not fit, or an engine that cannot serve them.

    Numerics: scores, softmax and accumulators are float32; weights are rounded to the type of v before the second product.
    Bit-for-bit deterministic, forward and backward, with every engine but fa4.
    """
    _check(q, k, v, index, engine)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # The reference needs no transposed lists; on a CPU nothing else runs.
    needs_lists = needs_grad and engine != "reference" and q.device.type != "cpu"
    lists = index.transpose() if needs_lists else (None, None, None)
    out, lse = torch.ops.attnmux_blocksparse.forward(
        q,
        k,
        v,
        index.blocks,
        index.counts,
        index.q_lengths,
        index.k_lengths,
        *lists,
        index.block_q,
        index.block_k,
        index.finite_padding,
        index.even_rows,
        scale,
        engine or "",
    )
    return (out, lse) if return_lse else out


def transpose(blocks: torch.Tensor, counts: torch.Tensor, num_key_blocks: int) -> TransposedLists:
    """The transposed lists of a `BlockIndex` (see `prepare.transpose_lists`) and the order to start them in."""
    return TransposedLists(*torch.ops.attnmux_blocksparse.transpose(blocks, counts, num_key_blocks))


def select_top_blocks(
    pooled_q: torch.Tensor, pooled_k: torch.Tensor, topk: int, *, protected: int = 0, order: float = 1.0
) -> torch.Tensor:
    """The key blocks that score best against each query block, as lists for a `BlockIndex`.

    Args:
        pooled_q: [B, H, N_q, D], float32 or float64, one vector per query block. Made contiguous if it is not.
        pooled_k: [B, H_kv, N_k, D], type and device of pooled_q; H_kv divides H, and query head h reads key head
            h // (H / H_kv).
        topk: key blocks kept per query block, in [1, N_k].
        protected: the first key blocks, so many, are kept in any case and count among the kept; in [0, topk].
        order: factor on the scores; its sign decides which are best, 0 makes all equal.

    Returns:
        int32 [B, H, N_q, topk], ascending: always exactly topk different blocks. At equal scores the lower number is kept;
        a score of NaN counts as the best. No gradient.

    Raises:
        UnsupportedRequestError: shapes, types, devices or numbers that do not fit.

    Numerics: products and sums in float32 (float64 for float64). The GPU's float32 products are made of six products of
    bfloat16 parts, which agree with plain ones to a few units in the last place; infinities may count as NaN there. The
    scores of a few heads lie in memory at a time.
    """
    if pooled_q.dim() != 4 or pooled_k.dim() != 4 or pooled_q.dtype not in (torch.float32, torch.float64):
        raise UnsupportedRequestError(
            f"pooled_q and pooled_k must be [B, H, N, D], float32 or float64; got {tuple(pooled_q.shape)} and "
            f"{tuple(pooled_k.shape)}, {pooled_q.dtype}."
        )
    if pooled_k.dtype != pooled_q.dtype or pooled_k.device != pooled_q.device:
        raise UnsupportedRequestError(
            f"pooled_k is {pooled_k.dtype} on {pooled_k.device}, pooled_q is {pooled_q.dtype} on {pooled_q.device}; type "
            "and device must agree."
        )
    batch, heads, _, head_dim = pooled_q.shape
    heads_k = pooled_k.shape[1]
    if pooled_k.shape[0] != batch or pooled_k.shape[3] != head_dim or heads_k == 0 or heads % heads_k:
        raise UnsupportedRequestError(
            f"pooled_k {tuple(pooled_k.shape)} does not go with pooled_q {tuple(pooled_q.shape)}: batch and last dimension "
            "must agree, and its heads divide those of pooled_q."
        )
    if not 1 <= topk <= pooled_k.shape[2]:
        raise UnsupportedRequestError(f"topk={topk!r} must lie in [1, {pooled_k.shape[2]}], the number of key blocks.")
    if not 0 <= protected <= topk:
        raise UnsupportedRequestError(f"protected={protected!r} must lie in [0, {topk}], the number of kept blocks.")
    with torch.no_grad():
        lists: torch.Tensor = torch.ops.attnmux_blocksparse.select(
            pooled_q.detach().contiguous(), pooled_k.detach().contiguous(), topk, protected, order
        )
    return lists


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: BlockIndex, engine: str | None) -> None:
    """Refuse arguments that do not fit together, naming the first."""
    if not isinstance(index, BlockIndex):
        raise UnsupportedRequestError(f"index must be a BlockIndex; got {type(index).__name__}.")
    if engine is not None and engine not in ENGINES:
        raise UnsupportedRequestError(f"engine={engine!r} is not known; engines are {', '.join(ENGINES)}.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise UnsupportedRequestError(f"{name} must be [B, S, H, D]; got {tuple(x.shape)}.")
        if x.dtype != q.dtype or x.device != q.device:
            raise UnsupportedRequestError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; type and device must agree."
            )
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise UnsupportedRequestError(f"the last dimension of {name} must be contiguous; strides are {x.stride()}.")
    if not q.is_floating_point():
        raise UnsupportedRequestError(f"q, k and v must be floating point; got {q.dtype}.")
    if k.shape != v.shape:
        raise UnsupportedRequestError(f"k and v must have one shape; got {tuple(k.shape)} and {tuple(v.shape)}.")
    batch, len_q, heads, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise UnsupportedRequestError(
            f"k and v must have the batch and head size of q, {batch} and {head_dim}; got {k.shape[0]} and {k.shape[3]}."
        )
    heads_k = k.shape[2]
    if heads_k == 0 or heads % heads_k:
        raise UnsupportedRequestError(f"the {heads_k} heads of k and v must divide the {heads} heads of q.")
    if index.blocks.device != q.device:
        raise UnsupportedRequestError(
            f"index is on {index.blocks.device}, q on {q.device}; build the index on one device."
        )
    shape = index.blocks.shape
    if shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise UnsupportedRequestError(
            f"index.blocks has {shape[0]} batches and {shape[1]} heads; needed: 1 or {batch}, and 1 or {heads}."
        )
    for name, lengths in (("q_lengths", index.q_lengths), ("k_lengths", index.k_lengths)):
        if lengths is not None and lengths.shape[0] not in (1, batch):
            raise UnsupportedRequestError(f"index.{name} has {lengths.shape[0]} rows; needed: 1 or {batch}.")
    if shape[2] != -(-len_q // index.block_q):
        raise UnsupportedRequestError(
            f"index lists {shape[2]} query blocks; {len_q} query tokens make {-(-len_q // index.block_q)} of {index.block_q}."
        )
    # A plain number held by the index would tie a compiled graph to one length.
    if not torch.compiler.is_compiling() and index.num_key_blocks != -(-k.shape[1] // index.block_k):
        raise UnsupportedRequestError(
            f"index is for {index.num_key_blocks} key blocks; {k.shape[1]} key tokens make "
            f"{-(-k.shape[1] // index.block_k)} of {index.block_k}."
        )


@torch.library.custom_op("attnmux_blocksparse::transpose", mutates_args=())
def _transpose_op(
    blocks: torch.Tensor, counts: torch.Tensor, num_key_blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not can_launch(blocks):
        offsets, entries = prepare.transpose_lists(blocks, counts, num_key_blocks)
        return offsets, entries, prepare.hot_first_order(offsets)
    from attnmux_blocksparse.kernels.transpose import launch_transpose

    return launch_transpose(blocks, counts, num_key_blocks)


@_transpose_op.register_fake
def _(
    blocks: torch.Tensor, counts: torch.Tensor, num_key_blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, num_query_blocks, width = blocks.shape
    return (
        blocks.new_empty(batch, heads, num_key_blocks + 1),
        blocks.new_empty(batch, heads, num_query_blocks * width),
        blocks.new_empty(batch, heads, num_key_blocks),
    )


@torch.library.custom_op("attnmux_blocksparse::select", mutates_args=())
def _select_op(pooled_q: torch.Tensor, pooled_k: torch.Tensor, topk: int, protected: int, order: float) -> torch.Tensor:
    if can_launch(pooled_q) and pooled_q.dtype == torch.float32 and pooled_q.numel() > 0:
        from attnmux_blocksparse.kernels import select

        if pooled_k.shape[2] <= select.MOST_COLUMNS:
            return select.launch_select(pooled_q, pooled_k, topk, protected, order)
    with torch.autocast(pooled_q.device.type, enabled=False):
        return reference.select(pooled_q, pooled_k, topk, protected, order)


@_select_op.register_fake
def _(pooled_q: torch.Tensor, pooled_k: torch.Tensor, topk: int, protected: int, order: float) -> torch.Tensor:
    return pooled_q.new_empty(*pooled_q.shape[:3], topk, dtype=torch.int32)


@torch.library.custom_op("attnmux_blocksparse::forward", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    q_lengths: torch.Tensor | None,
    k_lengths: torch.Tensor | None,
    offsets: torch.Tensor | None,
    entries: torch.Tensor | None,
    order: torch.Tensor | None,
    block_q: int,
    block_k: int,
    finite_padding: bool,
    even_rows: bool,
    softmax_scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    index = IndexTensors(blocks, counts, block_q, block_k, q_lengths, k_lengths, finite_padding, even_rows)
    chosen = choose_engine(engine, KernelRequest(q, k, v, block_q, block_k, softmax_scale, index.has_valid_lengths))
    if chosen == "reference":
        # An operator's body may run under autocast, of which the reference's products must not know.
        with torch.autocast(q.device.type, enabled=False):
            out, lse = reference.attention_forward(q, k, v, index, softmax_scale)
        return out, lse.float()
    from attnmux_blocksparse.kernels import launch

    result: tuple[torch.Tensor, torch.Tensor] = launch.attention_forward(chosen, q, k, v, index, softmax_scale)
    return result


@_forward_op.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, len_q, heads, _head_dim = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(batch, heads, len_q, dtype=torch.float32)


@torch.library.custom_op("attnmux_blocksparse::backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    q_lengths: torch.Tensor | None,
    k_lengths: torch.Tensor | None,
    offsets: torch.Tensor | None,
    entries: torch.Tensor | None,
    order: torch.Tensor | None,
    block_q: int,
    block_k: int,
    finite_padding: bool,
    even_rows: bool,
    softmax_scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = IndexTensors(
        blocks, counts, block_q, block_k, q_lengths, k_lengths, finite_padding, even_rows, offsets, entries, order
    )
    chosen = choose_engine(engine, KernelRequest(q, k, v, block_q, block_k, softmax_scale, index.has_valid_lengths))
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.attention_backward(dout, dlse, q, k, v, index, softmax_scale)
    from attnmux_blocksparse.kernels import launch

    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = launch.attention_backward(
        chosen, dout, dlse, q, k, v, out, lse, index, softmax_scale
    )
    return grads


@_backward_op.register_fake
def _(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *index_tensors = inputs[:10]
    ctx.save_for_backward(q, k, v, *output, *index_tensors)
    ctx.options = inputs[10:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, *index_tensors = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 16
    if dout is None:
        dout = torch.zeros_like(out)
    grads = torch.ops.attnmux_blocksparse.backward(dout, dlse, q, k, v, out, lse, *index_tensors, *ctx.options)
    return (*grads, *(None,) * 13)


torch.library.register_autograd("attnmux_blocksparse::forward", _backward, setup_context=_save_for_backward)
