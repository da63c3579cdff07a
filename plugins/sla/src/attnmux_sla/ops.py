"""SLA as functions of tensors: check, choose blocks, attend. The operators are known to autograd, torch.compile and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse.index import BlockIndex
from attnmux_blocksparse.ops import block_sparse_attention, select_top_blocks
from attnmux_blocksparse.prepare import check_tensors, compute_dtype, resolve_scale
from attnmux_sla import reference
from attnmux_sla.kernels import ENGINES, HALF_TYPES, choose_engine
from attnmux_sla.prepare import (
    FEATURE_MAPS,
    LINEAR_KEYS,
    count_blocks,
    count_kept_blocks,
    order_of_scale,
)

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "ENGINES",
    "KeySummary",
    "SparseBranch",
    "get_block_map",
    "mean_pool",
    "select_blocks",
    "sparse_linear_attention",
]

Router = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Pooled q `[B, H, N_q, D]` and pooled k `[B, H_kv, N_k, D]` to what is scored in their place, of the same shapes."""

Combination = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Sparse branch, linear branch and q, each `[B, S_q, H, D]` and the branches in float32 or float64, to the output."""


class KeySummary(NamedTuple):
    """What one pass over k and v gives: pooled keys, state, mass and range of v, as `reference.summarize_keys` has them."""

    pooled_k: torch.Tensor
    state: torch.Tensor
    mass: torch.Tensor
    range_v: torch.Tensor


class SparseBranch:
    """Computes the sparse branch of one call in place of block-sparse attention; may pool q in a pass that it makes anyway."""

    def pools_queries(self, feature_map: str) -> bool:
        """Return whether `pool_queries` is to be called, where all of SLA is fused passes."""
        return False

    def pool_queries(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_q: int, softmax_scale: float, keys: KeySummary
    ) -> torch.Tensor:
        """Return the means of the blocks of q, `[B, H, N_q, D]`, float32, float64 for float64; called before `attend`."""
        raise NotImplementedError

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: BlockIndex, softmax_scale: float
    ) -> torch.Tensor:
        """Return the sparse branch over the chosen blocks, `[B, S_q, H, D]` in the dtype of q."""
        raise NotImplementedError


_BLOCK_SIZES = (64, 128, 256)


def sparse_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor | None = None,
    proj_bias: torch.Tensor | None = None,
    *,
    topk_ratio: float = 0.1,
    feature_map: str = "softmax",
    linear_keys: str = "all",
    negligible_ratio: float = 0.1,
    block_q: int = 128,
    block_k: int = 64,
    softmax_scale: float | None = None,
    protected_tokens: int = 0,
    router: Router | None = None,
    combine: Combination | None = None,
    sparse_branch: SparseBranch | None = None,
    engine: str | None = None,
) -> torch.Tensor:
    """Attend to the key blocks that score best, and to the other keys by linear attention.

    Args:
        q: `[B, S_q, H, D]`, floating. bfloat16 or float16 on a GPU, D a multiple of 16 up to 128, for the kernels. Any
            strides with D contiguous; not modified.
        k: `[B, S_k, H_kv, D]`, dtype and device of q, likewise strided; H is a multiple of H_kv, and query head h reads
            key head `h // (H / H_kv)`.
        v: Like k.
        proj_weight: `[D, D]`, any floating dtype; the linear branch is multiplied by its transpose. None = not projected.
        proj_bias: `[D]`, added to the output; None = none.
        topk_ratio: Fraction of key blocks kept per query block, in (0, 1]; `prepare.count_kept_blocks` has the formula.
        feature_map: "softmax" (over the channels), "elu" (elu + 1) or "relu", of q and k as they are, unscaled.
        linear_keys: Keys of the linear branch: "all", also the kept ones (as released); "complement", those of blocks
            not kept; "marginal", the complement without the negligible blocks (as in the paper).
        negligible_ratio: Fraction of key blocks, those of lowest score, that "marginal" leaves out, in [0, 1]; rounded
            down. Other modes do not read it.
        block_q: Tokens of a query block: 64, 128 or 256.
        block_k: Tokens of a key block: 64, 128 or 256.
        softmax_scale: Factor on the scores of the sparse branch, finite; None = `D ** -0.5`. Its sign orders the blocks.
        protected_tokens: The blocks of the first tokens of k that are always kept, a text prompt's, say; they count as kept.
        router: What is scored in place of the pooled q and k; None = these themselves.
        combine: How the branches are joined; None = their sum, the linear one projected. Excludes the projection.
        sparse_branch: What computes the sparse branch; None = block-sparse attention, in whose place a quantised one, say.
        engine: "reference" or "triton" (sm80 on) for everything but the sparse branch, whose own engine is the reference
            in the first case and the fastest one otherwise. None takes the fastest. A named engine runs or raises.

    Returns:
        `[B, S_q, H, D]` in the dtype of q, contiguous.

    Raises:
        UnsupportedRequestError: Shapes, dtypes, devices, strides or numbers that do not fit; an engine that cannot serve
            them.

    Numerics:
        Means, scores, feature maps, states, sums and the folded projection are float32 (float64 for float64 inputs), also
        under autocast; operands of products with the tokens are rounded to the dtype of q. The sparse branch is rounded
        to it before the branches are added. Deterministic, forward and backward; the choice of blocks carries no gradient.
        Without `combine` and with all keys the linear branch runs in two fused passes; otherwise in plain PyTorch, the
        states of D * D numbers of all blocks of a few heads at a time.

    Source:
        SLA, arXiv 2509.24006; default semantics as released (github.com/thu-ml/SLA, branch main), where the linear branch
        reads all keys. Differs from there in what README.md lists.
    """
    _check(q, k, v, block_q, block_k, engine)
    _check_options(q, k, proj_weight, proj_bias, feature_map, linear_keys, negligible_ratio, protected_tokens, combine)
    scale = resolve_scale(softmax_scale, q.shape[3])
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, proj_weight, proj_bias)
    )
    # with another sparse branch the fused linear branch is for inference: its gradients come with those of the branch it knows
    is_fused = combine is None and linear_keys == "all" and (sparse_branch is None or not needs_grad)
    chosen, sparse_engine = engine or "", "reference" if engine == "reference" else ""
    with torch.autocast(q.device.type, enabled=False):
        with torch.no_grad():
            shares_passes = is_fused and sparse_branch is not None and sparse_branch.pools_queries(feature_map)
            if is_fused:
                keys = KeySummary(
                    *torch.ops.attnmux_sla.summarize_keys(
                        k.detach(), v.detach(), block_k, feature_map, shares_passes, chosen
                    )
                )
                pooled_k, state, mass, _ = keys
            else:
                pooled_k = torch.ops.attnmux_sla.pool(k.detach(), block_k, chosen)
            if shares_passes:
                assert sparse_branch is not None
                pooled_q = sparse_branch.pool_queries(q, k, v, block_q, scale, keys)
            else:
                pooled_q = torch.ops.attnmux_sla.pool(q.detach(), block_q, chosen)
            pooled_q, pooled_k = _route(router, pooled_q, pooled_k)
            kept, protected = _count_kept(topk_ratio, k.shape[1], block_k, protected_tokens)
            order = order_of_scale(scale)
            blocks = select_top_blocks(pooled_q, pooled_k, kept, protected=protected, order=order)
        index = _index(blocks, k.shape[1], block_q, block_k)
        out: torch.Tensor
        if is_fused and sparse_branch is not None:
            sparse = sparse_branch.attend(q, k, v, index, scale)
            out = torch.ops.attnmux_sla.add_linear_branch(
                q, sparse, state, mass, proj_weight, proj_bias, feature_map, chosen
            )
            return out
        if is_fused:
            lists = index.transpose() if needs_grad and q.device.type != "cpu" else (None, None, None)
            out = torch.ops.attnmux_sla.attend(
                q, k, v, proj_weight, proj_bias, state, mass, index.blocks, index.counts, *lists,
                block_q, block_k, scale, feature_map, chosen, sparse_engine,
            )[0]  # fmt: skip
            return out
        visible = _visible_blocks(blocks, pooled_q, pooled_k, linear_keys, negligible_ratio, order, chosen)
        if sparse_branch is not None:
            sparse = sparse_branch.attend(q, k, v, index, scale)
        else:
            attended = block_sparse_attention(q, k, v, index, softmax_scale=scale, engine=sparse_engine or None)
            assert isinstance(attended, torch.Tensor)
            sparse = attended
        linear = reference.linear_attention(
            q, k, v, feature_map=feature_map, visible=visible, block_q=block_q, block_k=block_k
        )
        sparse = sparse.to(linear.dtype)
        if combine is not None:
            out = combine(sparse, linear, q)
        else:
            weight, bias = (None if x is None else x.to(linear.dtype) for x in (proj_weight, proj_bias))
            out = sparse + (linear if weight is None else F.linear(linear, weight))
            out = out if bias is None else out + bias
        return out.to(q.dtype).contiguous()


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    topk_ratio: float = 0.1,
    block_q: int = 128,
    block_k: int = 64,
    softmax_scale: float | None = None,
    protected_tokens: int = 0,
    router: Router | None = None,
    engine: str | None = None,
) -> BlockIndex:
    """Return the key blocks that every query block keeps, as `sparse_linear_attention` chooses them; arguments as there."""
    _check(q, k, k, block_q, block_k, engine)
    scale = resolve_scale(softmax_scale, q.shape[3])
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        pooled_q, pooled_k = (
            torch.ops.attnmux_sla.pool(x.detach(), block, engine or "") for x, block in ((q, block_q), (k, block_k))
        )
        pooled_q, pooled_k = _route(router, pooled_q, pooled_k)
        kept, protected = _count_kept(topk_ratio, k.shape[1], block_k, protected_tokens)
        order = order_of_scale(scale)
        blocks = select_top_blocks(pooled_q, pooled_k, kept, protected=protected, order=order)
        return _index(blocks, k.shape[1], block_q, block_k)


def get_block_map(
    q: torch.Tensor, k: torch.Tensor, topk_ratio: float, BLKQ: int = 64, BLKK: int = 64
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the block map in the form of the published function of this name; attention itself does not make it.

    Args:
        q: `[B, H, L_q, D]`, floating, D contiguous.
        k: `[B, H_kv, L_k, D]`, likewise.
        topk_ratio: Fraction of key blocks kept per query block, in (0, 1].
        BLKQ: Tokens of a query block: 64, 128 or 256.
        BLKK: Tokens of a key block: 64, 128 or 256.

    Returns:
        The map, int8 `[B, H, N_q, N_k]`, 1 where a block is kept; its lists, int64 `[B, H, N_q, topk]`, ascending (there:
        in no order); and topk.

    Raises:
        UnsupportedRequestError: Shapes, dtypes, devices or numbers that do not fit.
    """
    index = select_blocks(q.transpose(1, 2), k.transpose(1, 2), topk_ratio=topk_ratio, block_q=BLKQ, block_k=BLKK)
    return index.to_block_mask().to(torch.int8), index.blocks.long(), index.blocks.shape[3]


def mean_pool(x: torch.Tensor, BLK: int) -> torch.Tensor:
    """Average the tokens of every block, the last one over the tokens that it has.

    Args:
        x: `[B, H, L, D]`, floating, D contiguous; not modified.
        BLK: Tokens of a block: 64, 128 or 256.

    Returns:
        `[B, H, ceil(L / BLK), D]` in the dtype of x, added up in float32. Attention scores the unrounded means.

    Raises:
        UnsupportedRequestError: x or BLK does not fit.
    """
    x = x.transpose(1, 2)
    _check(x, x, x, BLK, BLK, None)
    pooled: torch.Tensor = torch.ops.attnmux_sla.pool(x.detach(), BLK, "")
    return pooled.to(x.dtype)


def _count_kept(topk_ratio: float, length_k: int, block_k: int, protected_tokens: int) -> tuple[int, int]:
    """Return the kept and, among them, the protected key blocks."""
    num_key_blocks = count_blocks(length_k, block_k)
    protected = min(count_blocks(protected_tokens, block_k), num_key_blocks)
    return count_kept_blocks(topk_ratio, num_key_blocks, protected), protected


def _route(router: Router | None, pooled_q: torch.Tensor, pooled_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if router is None:
        return pooled_q, pooled_k
    routed_q, routed_k = router(pooled_q, pooled_k)
    return routed_q.to(pooled_q.dtype).contiguous(), routed_k.to(pooled_k.dtype).contiguous()


def _index(blocks: torch.Tensor, length_k: int, block_q: int, block_k: int) -> BlockIndex:
    counts = torch.full(blocks.shape[:3], blocks.shape[3], dtype=torch.int32, device=blocks.device)
    return BlockIndex(
        blocks, counts, num_key_blocks=count_blocks(length_k, block_k), block_q=block_q, block_k=block_k, even_rows=True
    )


def _visible_blocks(
    blocks: torch.Tensor,
    pooled_q: torch.Tensor,
    pooled_k: torch.Tensor,
    linear_keys: str,
    negligible_ratio: float,
    order: float,
    engine: str,
) -> torch.Tensor | None:
    """Return which key blocks the linear branch of every query block sees, bool `[B, H, N_q, N_k]`; None = all."""
    if linear_keys == "all":
        return None
    num_key_blocks = pooled_k.shape[2]
    visible = torch.ones(*blocks.shape[:3], num_key_blocks, dtype=torch.bool, device=blocks.device)
    visible.scatter_(-1, blocks.long(), False)
    negligible = int(negligible_ratio * num_key_blocks + 1e-6)
    if linear_keys == "marginal" and negligible:
        lowest = select_top_blocks(pooled_q, pooled_k, negligible, order=-order)
        visible.scatter_(-1, lowest.long(), False)
    return visible


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_q: int, block_k: int, engine: str | None) -> None:
    """Refuse tensors that do not fit together, naming the first."""
    if engine is not None and engine not in ENGINES:
        raise UnsupportedRequestError(f"engine={engine!r} is not known; engines are {', '.join(ENGINES)}")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block not in _BLOCK_SIZES:
            raise UnsupportedRequestError(f"{name}={block!r} is not supported; block sizes are 64, 128 and 256 tokens")
    check_tensors(q, k, v)


def _check_options(
    q: torch.Tensor,
    k: torch.Tensor,
    proj_weight: torch.Tensor | None,
    proj_bias: torch.Tensor | None,
    feature_map: str,
    linear_keys: str,
    negligible_ratio: float,
    protected_tokens: int,
    combine: Combination | None,
) -> None:
    head_size = q.shape[3]
    for name, value, known in (("feature_map", feature_map, FEATURE_MAPS), ("linear_keys", linear_keys, LINEAR_KEYS)):
        if value not in known:
            raise UnsupportedRequestError(f"{name}={value!r} is not known; expected one of {', '.join(known)}")
    if not 0 <= negligible_ratio <= 1:
        raise UnsupportedRequestError(f"negligible_ratio must be in [0, 1], got {negligible_ratio!r}")
    if not 0 <= protected_tokens <= k.shape[1]:
        raise UnsupportedRequestError(
            f"protected_tokens must be in [0, {k.shape[1]}], the tokens of k, got {protected_tokens!r}"
        )
    for name, x, shape in (
        ("proj_weight", proj_weight, (head_size, head_size)),
        ("proj_bias", proj_bias, (head_size,)),
    ):
        if x is None:
            continue
        if combine is not None:
            raise UnsupportedRequestError(f"{name} is given together with combine, which joins the branches without it")
        if x.shape != shape or not x.is_floating_point():
            raise UnsupportedRequestError(f"{name} must be floating point {shape}, got {x.dtype} {tuple(x.shape)}")
        if x.device != q.device:
            raise UnsupportedRequestError(f"{name} is on {x.device} and q on {q.device}; move them to one device")


def _engine(name: str, q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_TYPES) -> ModuleType:
    """Return the module whose functions compute; both have the same."""
    if choose_engine(name, q, k, dtypes) == "reference":
        return reference
    from attnmux_sla.kernels import launch

    return launch


@torch.library.custom_op("attnmux_sla::pool", mutates_args=())
def _pool_op(x: torch.Tensor, block: int, engine: str) -> torch.Tensor:
    pooled: torch.Tensor = _engine(engine, x, x).pool(x, block)
    return pooled


@_pool_op.register_fake
def _(x: torch.Tensor, block: int, engine: str) -> torch.Tensor:
    B, S, H, D = x.shape
    return x.new_empty(B, H, count_blocks(S, block), D, dtype=compute_dtype(x.dtype))


@torch.library.custom_op("attnmux_sla::summarize_keys", mutates_args=())
def _summarize_keys_op(
    k: torch.Tensor, v: torch.Tensor, block_k: int, feature_map: str, needs_range: bool, engine: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    summary: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = _engine(engine, k, v).summarize_keys(
        k, v, block_k, feature_map, needs_range
    )
    return summary


@_summarize_keys_op.register_fake
def _(
    k: torch.Tensor, v: torch.Tensor, block_k: int, feature_map: str, needs_range: bool, engine: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    B, S, H, D = k.shape
    dtype = compute_dtype(k.dtype)
    return (
        k.new_empty(B, H, count_blocks(S, block_k), D, dtype=dtype),
        k.new_empty(B, H, D, D, dtype=dtype),
        k.new_empty(B, H, D, dtype=dtype),
        k.new_empty((B, H, 2, D) if needs_range else (0, 2, D), dtype=dtype),
    )


@torch.library.custom_op("attnmux_sla::add_linear_branch", mutates_args=())
def _add_linear_branch_op(
    q: torch.Tensor,
    sparse: torch.Tensor,
    state: torch.Tensor,
    mass: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    feature_map: str,
    engine: str,
) -> torch.Tensor:
    out: torch.Tensor = _engine(engine, q, q).add_linear_branch(q, sparse, state, mass, weight, bias, feature_map)
    return out


@_add_linear_branch_op.register_fake
def _(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("attnmux_sla::attend", mutates_args=())
def _attend_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    mass: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    offsets: torch.Tensor | None,
    entries: torch.Tensor | None,
    order: torch.Tensor | None,
    block_q: int,
    block_k: int,
    softmax_scale: float,
    feature_map: str,
    engine: str,
    sparse_engine: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both branches. `state` and `mass` are those of k and v; gradients pass through them to k and v."""
    sparse, lse = torch.ops.attnmux_blocksparse.forward(
        q, k, v, blocks, counts, None, None, offsets, entries, order,
        block_q, block_k, False, True, softmax_scale, sparse_engine,
    )  # fmt: skip
    out = _engine(engine, q, k).add_linear_branch(q, sparse, state, mass, weight, bias, feature_map)
    return out, sparse, lse


@_attend_op.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, S, H, _D = q.shape
    out, sparse = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    return out, sparse, q.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("attnmux_sla::attend_backward", mutates_args=())
def _attend_backward_op(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    state: torch.Tensor,
    mass: torch.Tensor,
    sparse: torch.Tensor,
    lse: torch.Tensor,
    blocks: torch.Tensor,
    counts: torch.Tensor,
    offsets: torch.Tensor | None,
    entries: torch.Tensor | None,
    order: torch.Tensor | None,
    block_q: int,
    block_k: int,
    softmax_scale: float,
    feature_map: str,
    engine: str,
    sparse_engine: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    # a gradient may be an expanded view (that of a sum, say)
    if dout.stride(3) != 1 or 0 in dout.stride():
        dout = dout.contiguous()
    grads = torch.ops.attnmux_blocksparse.backward(
        dout, None, q, k, v, sparse, lse, blocks, counts, None, None, offsets, entries, order,
        block_q, block_k, False, True, softmax_scale, sparse_engine,
    )  # fmt: skip
    # Backward may run under autocast, of which its products must not know.
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = _engine(
            engine, q, k
        ).linear_backward(dout, q, k, v, state, mass, weight, feature_map, grads)
    return result


@_attend_backward_op.register_fake
def _(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight: torch.Tensor | None,
    state: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, state.new_empty(state.shape[2:]), state.new_empty(state.shape[3:])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, weight, bias, state, mass, *lists = inputs[:12]
    _, sparse, lse = output
    ctx.save_for_backward(q, k, v, weight, state, mass, sparse, lse, *lists)
    ctx.projection_dtypes = [None if x is None else x.dtype for x in (weight, bias)]
    ctx.options = inputs[12:]
    ctx.mark_non_differentiable(sparse, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 18
    *grads, dweight, dbias = torch.ops.attnmux_sla.attend_backward(dout, *ctx.saved_tensors, *ctx.options)
    projection = (
        None if dtype is None else grad.to(dtype)
        for grad, dtype in zip((dweight, dbias), ctx.projection_dtypes, strict=True)
    )
    return (*grads, *projection, *(None,) * 13)


torch.library.register_autograd("attnmux_sla::attend", _backward, setup_context=_save_for_backward)
