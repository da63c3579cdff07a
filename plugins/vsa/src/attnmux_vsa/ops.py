"""Video Sparse Attention as functions of tensors: check, prepare, compute.

The kernels' part is four operators known to autograd, torch.compile and CUDA graphs (tile, coarse, untile, and the block-sparse
operator between them), so that each saves only what its own gradient needs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnmux.errors import ForwardContextError, UnsupportedRequestError
from attnmux_blocksparse.index import BlockIndex
from attnmux_blocksparse.ops import block_sparse_attention, select_top_blocks
from attnmux_vsa.kernels import ENGINES, choose_engine
from attnmux_vsa.prepare import VideoTiling, resolve_topk, tile_tokens
from attnmux_vsa.reference import (
    CONFORM,
    keep_top_tiles,
    score_means,
    tile_means,
    video_sparse_attention_reference,
)

__all__ = ["ENGINES", "select_tiles", "video_sparse_attention"]

Pair = tuple[torch.Tensor, torch.Tensor]
Triplet = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def video_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    metadata: VideoTiling | None,
    *,
    topk: int | None = None,
    sparsity: float | None = None,
    gate_compress: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    conform: str | None = None,
    engine: str | None = None,
) -> torch.Tensor:
    """Attend from every tile of tokens to the tiles that score best against it, plus a gated coarse branch.

    Args:
        q: `[B, S, H, D]` in raster order, float16, bfloat16, float32 or float64, CPU or CUDA, any strides; not
            modified.
        k: `[B, S, H_kv, D]`, dtype and device of q; H is a multiple of H_kv.
        v: `[B, S, H_kv, D]`, likewise.
        metadata: The grid and its tables, on the device of q: `VideoSparseAttentionMetadata`, or what
            `prepare.build_video_tiling` returns.
        topk: Key tiles kept per query tile and query head, in [1, N]; None = as the metadata says.
        sparsity: Fraction of key tiles left out, in [0, 1]; instead of `topk`.
        gate_compress: `[B, S, H, D]`, dtype and device of q: factor on the coarse branch, applied as it is. None leaves
            the coarse branch out, the same as a gate of zeros.
        softmax_scale: Factor on the scores of both branches, finite; None = `D ** -0.5`; 0.0 is a value.
        conform: "bf16-scores" chooses tiles as the published code does, by means and scores rounded to bfloat16, where ties
            are common. It changes the choice alone, and is slow. None chooses by float32 scores.
        engine: "reference" (any device and floating type) or "triton" (NVIDIA GPUs from sm80, bfloat16 and float16, D a
            multiple of 16 up to 128, tiles of 64, 128 or 256 tokens). None takes the faster one that serves the call. A
            named engine runs or raises.

    Returns:
        `[B, S, H, D]` in the dtype of q, contiguous.

    Raises:
        ForwardContextError: There is no metadata.
        UnsupportedRequestError: The metadata is of another kind; shapes, dtypes or devices do not go together; S is not
            the T * H * W of the grid; a number is out of its range; the engine is unknown.

    Numerics:
        Pooled means, scores, softmax and sums in float32 (float64 for float64 inputs). The reference rounds once to the
        dtype of q; the kernels round the weights of the fine branch and its output too. Deterministic, forward and backward;
        the choice of tiles carries no gradient. With every tile kept and no gate this is dense softmax attention.

    Source:
        VSA, arXiv 2505.13389; see `reference` for the formulas and for what differs from the published code.
    """
    tiling = check_call(q, k, metadata, v=v)
    if gate_compress is not None:
        _check_like_q("gate_compress", gate_compress, q, (q.shape[0], q.shape[1], q.shape[2], q.shape[3]))
    check_conform(conform)
    chosen = choose_engine(engine, q, math.prod(tiling.tile_size))
    kept = _resolve_topk(topk, sparsity, tiling)
    scale = _resolve_scale(softmax_scale, q.shape[3])
    if chosen == "triton":
        with torch.autocast(q.device.type, enabled=False):
            return _by_kernels(q, k, v, tiling, kept, scale, gate_compress, conform)
    return video_sparse_attention_reference(
        q,
        k,
        v,
        slot_of_token=tiling.slot_of_token,
        tile_sizes=tiling.variable_block_sizes,
        tile_volume=math.prod(tiling.tile_size),
        topk=kept,
        softmax_scale=scale,
        gate_compress=gate_compress,
        conform=conform,
    )


def select_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    metadata: VideoTiling | None,
    *,
    topk: int | None = None,
    sparsity: float | None = None,
    softmax_scale: float | None = None,
    conform: str | None = None,
) -> torch.Tensor:
    """Return which key tiles each query tile keeps, as `video_sparse_attention` chooses them.

    Args:
        q: `[B, S, H, D]`, as for `video_sparse_attention`.
        k: `[B, S, H_kv, D]`, likewise.
        metadata: The grid and its tables; `metadata.slot_of_token // M` is the tile of every raster token.
        topk: Key tiles kept, in [1, N]; None = as the metadata says.
        sparsity: Fraction of key tiles left out, in [0, 1]; instead of `topk`.
        softmax_scale: Factor on the scores; its sign and zero matter for the choice.
        conform: None or "bf16-scores", as for `video_sparse_attention`.

    Returns:
        `[B, H, N, topk]`, int64, ascending.

    Raises:
        ForwardContextError: There is no metadata.
        UnsupportedRequestError: As for `video_sparse_attention`.
    """
    tiling = check_call(q, k, metadata)
    check_conform(conform)
    kept = _resolve_topk(topk, sparsity, tiling)
    scale = _resolve_scale(softmax_scale, q.shape[3])
    sizes, volume = tiling.variable_block_sizes, math.prod(tiling.tile_size)
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        means = [
            tile_means(tile_tokens(x.to(compute_dtype), tiling.slot_of_token, sizes.shape[0], volume), sizes)
            for x in (q, k)
        ]
        if choose_engine(None, q, volume) == "triton":
            return _kept_tiles(means[0], means[1], kept, scale, conform).long()
        return keep_top_tiles(score_means(means[0], means[1], scale, conform=conform), kept)


def _by_kernels(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiling: VideoTiling,
    kept: int,
    scale: float,
    gate: torch.Tensor | None,
    conform: str | None,
) -> torch.Tensor:
    """The operator by Triton kernels and the block-sparse operator; arguments are checked."""
    tables = (tiling.token_of_slot, tiling.slot_of_token, tiling.variable_block_sizes)
    with_coarse = gate is not None
    q_tiles, q_means = torch.ops.attnmux_vsa.tile(q, *tables, True)
    k_tiles, k_means = torch.ops.attnmux_vsa.tile(k, *tables, True)
    v_tiles, v_means = torch.ops.attnmux_vsa.tile(v, *tables, with_coarse)
    with torch.no_grad():
        blocks = _kept_tiles(q_means.detach(), k_means.detach(), kept, scale, conform)
    volume = math.prod(tiling.tile_size)
    index = BlockIndex(
        blocks,
        blocks.new_full(blocks.shape[:3], blocks.shape[3]),
        num_key_blocks=tiling.variable_block_sizes.shape[0],
        block_q=volume,
        block_k=volume,
        # Padding is zeros: queries there attend to something that is thrown away, and their gradients are zero.
        k_lengths=tiling.variable_block_sizes if tiling.has_padding else None,
        finite_padding=True,
        even_rows=True,
    )
    fine = block_sparse_attention(
        q_tiles.transpose(1, 2), k_tiles.transpose(1, 2), v_tiles.transpose(1, 2), index, softmax_scale=scale
    )
    coarse = torch.ops.attnmux_vsa.coarse(q_means, k_means, v_means, scale)[0] if with_coarse else None
    out: torch.Tensor = torch.ops.attnmux_vsa.untile(fine, coarse, gate, *tables)
    return out


def _kept_tiles(
    q_means: torch.Tensor, k_means: torch.Tensor, kept: int, scale: float, conform: str | None
) -> torch.Tensor:
    """The kept tiles, int32 `[B, H, N, kept]`, ascending."""
    if conform is None:
        # of the scale only its sign matters for the order
        order = float((scale > 0) - (scale < 0))
        return select_top_blocks(q_means, k_means, kept, order=order)
    heads = range(q_means.shape[1])
    group = q_means.shape[1] // k_means.shape[1]
    # head by head, so that the scores of one head are the largest tensor
    rows = [
        keep_top_tiles(score_means(q_means[:, h : h + 1], k_means[:, h // group, None], scale, conform=conform), kept)
        for h in heads
    ]
    return torch.cat(rows, dim=1).to(torch.int32)


def check_conform(conform: str | None) -> str | None:
    """Return `conform` if it is known, else raise."""
    if conform is not None and conform not in CONFORM:
        raise UnsupportedRequestError(f"conform={conform!r} is not known; expected None or one of {', '.join(CONFORM)}")
    return conform


def check_metadata(metadata: object) -> VideoTiling:
    """Return the metadata if it describes a tiled video, else raise with what to do."""
    if metadata is None:
        raise ForwardContextError(
            "VIDEO_SPARSE_ATTN needs the grid of the video and got no metadata; build it with "
            "VideoSparseAttentionMetadataBuilder().build(current_timestep, raw_latent_shape, patch_size, VSA_sparsity, "
            "device) and pass it as attn_metadata=, or run under attnmux.set_forward_context(attn_metadata=...)"
        )
    if not isinstance(metadata, VideoTiling):
        raise UnsupportedRequestError(
            f"VIDEO_SPARSE_ATTN needs VideoSparseAttentionMetadata, got {type(metadata).__name__}; build it with "
            "VideoSparseAttentionMetadataBuilder"
        )
    return metadata


def check_call(q: torch.Tensor, k: torch.Tensor, metadata: object, *, v: torch.Tensor | None = None) -> VideoTiling:
    """Return the tiling after every check of q, k and v against it and one another."""
    tiling = check_metadata(metadata)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.dim() != 4:
            raise UnsupportedRequestError(
                f"{name} must be [batch, sequence, heads, head_dim], got shape {tuple(x.shape)}"
            )
    if q.dtype not in _DTYPES:
        raise UnsupportedRequestError(
            f"q has dtype {q.dtype}; VIDEO_SPARSE_ATTN computes {', '.join(map(str, _DTYPES))}"
        )
    B, S, H, D = q.shape
    # Sizes come from the tables, whose shapes are dynamic under torch.compile: every plain number of the metadata that is
    # read here would cost one more graph when it first changes.
    if tiling.slot_of_token.shape[0] != S:
        raise UnsupportedRequestError(
            f"q has {S} tokens, but the grid of the metadata is T x H x W = {_grid_text(tiling)} = "
            f"{tiling.total_seq_length}; build the metadata from the latent that these tokens come from, and pass "
            "neither text nor padding"
        )
    if k.shape[1] != S:
        raise UnsupportedRequestError(
            f"k has {k.shape[1]} tokens and q has {S}: both must be the same grid {_grid_text(tiling)}; use a "
            "dense backend for cross attention"
        )
    kv_heads = k.shape[2]
    if kv_heads == 0 or H % kv_heads:
        raise UnsupportedRequestError(f"q has {H} heads and k has {kv_heads}; H must be a multiple of H_kv")
    _check_like_q("k", k, q, (B, S, kv_heads, D))
    if v is not None:
        _check_like_q("v", v, q, (B, S, kv_heads, D))
    if tiling.slot_of_token.device != q.device:
        raise UnsupportedRequestError(
            f"q is on {q.device} and the metadata on {tiling.device}; build the metadata with device={str(q.device)!r}"
        )
    return tiling


def _grid_text(tiling: VideoTiling) -> str:
    return " x ".join(map(str, tiling.dit_seq_shape))


def _check_like_q(name: str, x: torch.Tensor, q: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
    if x.shape != shape:
        raise UnsupportedRequestError(
            f"{name} must have shape {shape} to go with q of shape {tuple(q.shape)}, got {tuple(x.shape)}"
        )
    if x.dtype != q.dtype:
        raise UnsupportedRequestError(f"{name} has dtype {x.dtype} and q {q.dtype}; cast them to one dtype")
    if x.device != q.device:
        raise UnsupportedRequestError(f"{name} is on {x.device} and q on {q.device}; move them to one device")


def _resolve_topk(topk: int | None, sparsity: float | None, tiling: VideoTiling) -> int:
    kept = resolve_topk(topk, sparsity, tiling.variable_block_sizes.shape[0])
    return tiling.topk if kept is None else kept


def _resolve_scale(softmax_scale: float | None, head_size: int) -> float:
    if softmax_scale is None:
        return float(head_size**-0.5)
    # Comparisons rather than math.isfinite, which cannot be traced with a dynamic scale; NaN fails them too.
    if not -math.inf < softmax_scale < math.inf:
        raise UnsupportedRequestError(f"softmax_scale must be finite, got {softmax_scale!r}")
    return softmax_scale


# The operators of the kernels' path. Tables: token_of_slot int32 [N * M], slot_of_token int64 [S], tile_sizes int32 [N].


@torch.library.custom_op("attnmux_vsa::tile", mutates_args=())
def _tile_op(
    x: torch.Tensor,
    token_of_slot: torch.Tensor,
    slot_of_token: torch.Tensor,
    tile_sizes: torch.Tensor,
    with_mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from attnmux_vsa.kernels import tiles

    result: Pair = tiles.tile(_with_rows(x), token_of_slot, tile_sizes, with_mean)
    return result


@_tile_op.register_fake
def _(
    x: torch.Tensor,
    token_of_slot: torch.Tensor,
    slot_of_token: torch.Tensor,
    tile_sizes: torch.Tensor,
    with_mean: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, head_size = x.shape
    n_tiles = tile_sizes.shape[0] if with_mean else 0
    return (
        x.new_empty(batch, heads, token_of_slot.shape[0], head_size),
        x.new_empty(batch, heads, n_tiles, head_size, dtype=torch.float32),
    )


@torch.library.custom_op("attnmux_vsa::tile_backward", mutates_args=())
def _tile_backward_op(
    dtiles: torch.Tensor | None,
    dmeans: torch.Tensor | None,
    token_of_slot: torch.Tensor,
    slot_of_token: torch.Tensor,
    tile_sizes: torch.Tensor,
    like: torch.Tensor,
) -> torch.Tensor:
    from attnmux_vsa.kernels import tiles

    dtiles = None if dtiles is None else _with_rows(dtiles)
    dmeans = None if dmeans is None else dmeans.contiguous()
    result: torch.Tensor = tiles.tile_backward(
        dtiles, dmeans, token_of_slot, tile_sizes, slot_of_token.shape[0], like.dtype
    )
    return result


@_tile_backward_op.register_fake
def _(
    dtiles: torch.Tensor | None,
    dmeans: torch.Tensor | None,
    token_of_slot: torch.Tensor,
    slot_of_token: torch.Tensor,
    tile_sizes: torch.Tensor,
    like: torch.Tensor,
) -> torch.Tensor:
    given = dtiles if dtiles is not None else dmeans
    assert given is not None
    return like.new_empty(given.shape[0], slot_of_token.shape[0], given.shape[1], given.shape[3])


def _save_tile(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.like = torch.empty(0, dtype=inputs[0].dtype, device=inputs[0].device)
    ctx.with_mean = inputs[4]
    ctx.set_materialize_grads(False)


def _tile_grad(ctx: Any, dtiles: torch.Tensor | None, dmeans: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    dmeans = dmeans if ctx.with_mean else None
    if dtiles is None and dmeans is None:
        return (None,) * 5
    return torch.ops.attnmux_vsa.tile_backward(dtiles, dmeans, *ctx.saved_tensors, ctx.like), None, None, None, None


torch.library.register_autograd("attnmux_vsa::tile", _tile_grad, setup_context=_save_tile)


@torch.library.custom_op("attnmux_vsa::coarse", mutates_args=())
def _coarse_op(
    q_means: torch.Tensor, k_means: torch.Tensor, v_means: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from attnmux_vsa.kernels import coarse

    result: Pair = coarse.coarse_attention(q_means, k_means, v_means, scale)
    return result


@_coarse_op.register_fake
def _(
    q_means: torch.Tensor, k_means: torch.Tensor, v_means: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q_means), q_means.new_empty(q_means.shape[:3])


@torch.library.custom_op("attnmux_vsa::coarse_backward", mutates_args=())
def _coarse_backward_op(
    dout: torch.Tensor,
    q_means: torch.Tensor,
    k_means: torch.Tensor,
    v_means: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from attnmux_vsa.kernels import coarse

    result: Triplet = coarse.coarse_backward(dout.contiguous(), q_means, k_means, v_means, out, lse, scale)
    return result


@_coarse_backward_op.register_fake
def _(
    dout: torch.Tensor, q_means: torch.Tensor, k_means: torch.Tensor, v_means: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q_means), torch.empty_like(k_means), torch.empty_like(v_means)


def _save_coarse(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.scale = inputs[3]
    ctx.set_materialize_grads(False)


def _coarse_grad(ctx: Any, dout: torch.Tensor | None, _dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 4
    return (*torch.ops.attnmux_vsa.coarse_backward(dout, *ctx.saved_tensors, ctx.scale), None)


torch.library.register_autograd("attnmux_vsa::coarse", _coarse_grad, setup_context=_save_coarse)


@torch.library.custom_op("attnmux_vsa::untile", mutates_args=())
def _untile_op(
    fine: torch.Tensor,
    coarse: torch.Tensor | None,
    gate: torch.Tensor | None,
    token_of_slot: torch.Tensor,
    slot_of_token: torch.Tensor,
    tile_sizes: torch.Tensor,
) -> torch.Tensor:
    from attnmux_vsa.kernels import tiles

    gate = None if gate is None else _with_rows(gate)
    result: torch.Tensor = tiles.untile(fine, coarse, gate, token_of_slot, tile_sizes.shape[0], slot_of_token.shape[0])
    return result


@_untile_op.register_fake
def _(
    fine: torch.Tensor,
    coarse: torch.Tensor | None,
    gate: torch.Tensor | None,
    token_of_slot: torch.Tensor,
    slot_of_token: torch.Tensor,
    tile_sizes: torch.Tensor,
) -> torch.Tensor:
    batch, _, heads, head_size = fine.shape
    return fine.new_empty(batch, slot_of_token.shape[0], heads, head_size)


@torch.library.custom_op("attnmux_vsa::untile_backward", mutates_args=())
def _untile_backward_op(
    dout: torch.Tensor, gate: torch.Tensor, coarse: torch.Tensor, token_of_slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from attnmux_vsa.kernels import tiles

    result: Triplet = tiles.untile_backward(_with_rows(dout), _with_rows(gate), coarse, token_of_slot)
    return result


@_untile_backward_op.register_fake
def _(
    dout: torch.Tensor, gate: torch.Tensor, coarse: torch.Tensor, token_of_slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, heads, head_size = dout.shape
    return (
        dout.new_empty(batch, heads, token_of_slot.shape[0], head_size),
        torch.empty_like(coarse),
        gate.new_empty(gate.shape),
    )


def _save_untile(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _fine, coarse, gate, *tables = inputs
    ctx.save_for_backward(coarse, gate, *tables)


def _untile_grad(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    coarse, gate, *tables = ctx.saved_tensors
    if gate is None:
        dfine = torch.ops.attnmux_vsa.tile(dout, *tables, False)[0]
        return dfine.transpose(1, 2), None, None, None, None, None
    dfine, dcoarse, dgate = torch.ops.attnmux_vsa.untile_backward(dout, gate, coarse, tables[0])
    return dfine.transpose(1, 2), dcoarse, dgate, None, None, None


torch.library.register_autograd("attnmux_vsa::untile", _untile_grad, setup_context=_save_untile)


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its last dimension is not contiguous, as that of an expanded gradient."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
