"""Video Mixture-of-Block Attention as functions of tensors: check, choose an engine, compute; known to autograd and compilers."""

from __future__ import annotations

import math

# torch.library reads the annotations of operators when they are defined
from collections.abc import Sequence  # noqa: TC003
from typing import Any

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux_vmoba import reference
from attnmux_vmoba.kernels import ENGINES, KernelRequest, choose_engine
from attnmux_vmoba.prepare import ChunkGrid, ChunkSize, Selection, check_selection, resolve_chunks, unpack_bits

__all__ = ["ENGINES", "attend_chunks", "check_tensors", "moba_attention", "select_bits", "select_chunks"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def moba_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    patch_resolution: Sequence[int],
    chunk_size: ChunkSize,
    topk: int = 1,
    select_mode: str = "topk",
    threshold: float = 0.25,
    threshold_type: str = "query_head",
    softmax_scale: float | None = None,
    engine: str | None = None,
) -> torch.Tensor:
    """Attend from every query to its own chunk of tokens and to the chunks whose mean key scores best.

    Args:
        q: `[B, S, H, D]` in raster order, float16, bfloat16, float32 or float64, CPU or CUDA, D contiguous, otherwise any
            strides; not modified.
        k: `[B, S, H_kv, D]`, dtype and device of q; H is a multiple of H_kv.
        v: Like k.
        patch_resolution: Tokens along T, H and W; S is their product.
        chunk_size: Frames of a 1-D chunk, (h, w) of a 2-D or (t, h, w) of a 3-D one; see `prepare.resolve_chunks`.
        topk: Chunks per query with mode "topk", its own included, >= 1; more than there are keeps all. 1 is the own alone.
        select_mode: "topk" or "threshold".
        threshold: Share of the normalised gates that mode "threshold" keeps, in [0, 1]: 0 keeps the own chunk alone, 1 all.
        threshold_type: Scope of the budget in either mode: "query_head", "head_global", "overall", and for thresholds
            "block". Never over several samples.
        softmax_scale: Factor on the scores, finite; None = `D ** -0.5`. The gates are unscaled.
        engine: One of `ENGINES`; None takes the fastest that serves the call. A named engine runs or raises.

    Returns:
        `[B, S, H, D]` in raster order and the dtype of q, contiguous.

    Raises:
        UnsupportedRequestError: Shapes, dtypes, devices, geometry or numbers that do not fit, or an engine that cannot serve.

    Numerics:
        Means, gates, scores, softmax and sums in float32 (float64 for float32 and float64 inputs). The choice carries no
        gradient.

    Source:
        VMoBA, arXiv 2506.23858. `reference.choose_chunks` has the rules, the README what differs from the published code.
    """
    check_selection(select_mode, threshold_type, topk, threshold)
    chunks = resolve_chunks(patch_resolution, chunk_size)
    how = Selection(select_mode, threshold_type, topk, threshold)
    return attend_chunks(q, k, v, chunks, how, softmax_scale=softmax_scale, engine=engine)


def select_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    patch_resolution: Sequence[int],
    chunk_size: ChunkSize,
    topk: int = 1,
    select_mode: str = "topk",
    threshold: float = 0.25,
    threshold_type: str = "query_head",
    engine: str | None = None,
) -> torch.Tensor:
    """Return which chunks every query attends to in `moba_attention`, whose arguments it takes.

    Returns:
        Bool `[B, H, C, S]`, tokens in chunk order (`process_moba_input` puts them so).
    """
    check_selection(select_mode, threshold_type, topk, threshold)
    chunks = resolve_chunks(patch_resolution, chunk_size)
    check_tensors(q, k, None, chunks)
    how = Selection(select_mode, threshold_type, topk, threshold)
    return unpack_bits(select_bits(q, k, chunks, how, engine), chunks.num_chunks)


def attend_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chunks: ChunkGrid,
    how: Selection,
    *,
    softmax_scale: float | None = None,
    engine: str | None = None,
) -> torch.Tensor:
    """`moba_attention` with geometry and choice already resolved and checked."""
    check_tensors(q, k, v, chunks)
    scale = float(q.shape[3] ** -0.5) if softmax_scale is None else softmax_scale
    # comparisons rather than math.isfinite, which cannot be traced with a dynamic scale; NaN fails them too
    if not -math.inf < scale < math.inf:
        raise UnsupportedRequestError(f"softmax_scale must be finite, got {softmax_scale!r}")
    words = select_bits(q, k, chunks, how, engine)
    every_query_keeps = how.topk if how.mode == "topk" and how.scope == "query_head" else 0
    out, _ = torch.ops.attnmux_vmoba.forward(
        q, k, v, words, chunks.grid, chunks.box, every_query_keeps, scale, engine or ""
    )
    return out  # type: ignore[no-any-return]


def select_bits(
    q: torch.Tensor, k: torch.Tensor, chunks: ChunkGrid, how: Selection, engine: str | None = None
) -> torch.Tensor:
    """Return the choice as `prepare.pack_bits` packs it; the arguments are checked already."""
    if engine == "triton" and how.scope != "query_head":
        raise UnsupportedRequestError(
            f"engine 'triton' chooses by query and head alone, and the scope is {how.scope!r}; use engine='reference'"
        )
    return torch.ops.attnmux_vmoba.select(  # type: ignore[no-any-return]
        q.detach(), k.detach(), chunks.grid, chunks.box, *how, engine or ""
    )


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, chunks: ChunkGrid) -> None:
    """Refuse tensors that do not fit the chunks or one another, naming the first."""
    named = [("q", q), ("k", k)] + ([("v", v)] if v is not None else [])
    for name, x in named:
        if x.dim() != 4:
            raise UnsupportedRequestError(f"{name} must be [batch, sequence, heads, head_dim], got {tuple(x.shape)}")
    if q.dtype not in _DTYPES:
        raise UnsupportedRequestError(f"q has dtype {q.dtype}; VMOBA_ATTN computes {', '.join(map(str, _DTYPES))}")
    B, S, H, D = q.shape
    if chunks.length != S:
        raise UnsupportedRequestError(
            f"q has {S} tokens, but the grid of the metadata has {chunks.length}; build the metadata from the latent that "
            "these tokens come from, and pass neither text nor padding"
        )
    if k.shape[1] != S:
        raise UnsupportedRequestError(
            f"k has length {k.shape[1]} and q {S}: both must be the tokens of one video; use a dense backend for cross attention"
        )
    heads_kv = k.shape[2]
    if heads_kv == 0 or H % heads_kv:
        raise UnsupportedRequestError(f"q has {H} heads and k has {heads_kv}; H must be a multiple of H_kv")
    for name, x in named[1:]:
        if x.shape != (B, S, heads_kv, D):
            raise UnsupportedRequestError(
                f"{name} must have shape {(B, S, heads_kv, D)} to go with q of shape {tuple(q.shape)}, got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise UnsupportedRequestError(
                f"{name} is {x.dtype} on {x.device} and q {q.dtype} on {q.device}; dtype and device must agree"
            )


def _chunks(grid: Sequence[int], box: Sequence[int]) -> ChunkGrid:
    return ChunkGrid((grid[0], grid[1], grid[2]), (box[0], box[1], box[2]))


@torch.library.custom_op("attnmux_vmoba::select", mutates_args=())
def _select_op(
    q: torch.Tensor,
    k: torch.Tensor,
    grid: Sequence[int],
    box: Sequence[int],
    mode: str,
    scope: str,
    topk: int,
    threshold: float,
    keeps_one: bool,
    engine: str,
) -> torch.Tensor:
    chunks, how = _chunks(grid, box), Selection(mode, scope, topk, threshold, keeps_one)
    # budgets over many queries need their gates in memory, which the reference has
    if choose_engine(engine, KernelRequest(q, k, chunks)) == "reference" or scope != "query_head":
        with torch.autocast(q.device.type, enabled=False):
            return reference.select_bits(q, k, chunks, how)
    from attnmux_vmoba.kernels import select

    words: torch.Tensor = select.launch_select(q, k, chunks, how)
    return words


@_select_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, grid: Sequence[int], box: Sequence[int], *_: Any) -> torch.Tensor:
    words = -(-_chunks(grid, box).num_chunks // 32)
    return q.new_empty(q.shape[0], q.shape[2], words, q.shape[1], dtype=torch.int32)


@torch.library.custom_op("attnmux_vmoba::forward", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    words: torch.Tensor,
    grid: Sequence[int],
    box: Sequence[int],
    topk: int,
    softmax_scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = _chunks(grid, box)
    if choose_engine(engine, KernelRequest(q, k, chunks)) == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.attention_forward(q, k, v, words, chunks, softmax_scale)
    from attnmux_vmoba.kernels.launch import attention_forward

    result: tuple[torch.Tensor, torch.Tensor] = attention_forward(q, k, v, words, chunks, topk, softmax_scale)
    return result


@_forward_op.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _head_dim = q.shape
    lse = q.new_empty(batch, heads, length, dtype=reference.compute_dtype(q.dtype))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@torch.library.custom_op("attnmux_vmoba::backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    words: torch.Tensor,
    grid: Sequence[int],
    box: Sequence[int],
    topk: int,
    softmax_scale: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chunks = _chunks(grid, box)
    if choose_engine(engine, KernelRequest(q, k, chunks)) == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.attention_backward(dout, q, k, v, out, lse, words, chunks, softmax_scale)
    from attnmux_vmoba.kernels.launch import attention_backward

    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = attention_backward(
        dout, q, k, v, out, lse, words, chunks, topk, softmax_scale
    )
    return grads


@_backward_op.register_fake
def _(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, words = inputs[:4]
    ctx.save_for_backward(q, k, v, *output, words)
    ctx.options = inputs[4:]
    # the log-sum-exp is for the backward pass alone; nobody is handed it
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    grads = torch.ops.attnmux_vmoba.backward(dout, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None,) * 6)


torch.library.register_autograd("attnmux_vmoba::forward", _backward, setup_context=_save_for_backward)
