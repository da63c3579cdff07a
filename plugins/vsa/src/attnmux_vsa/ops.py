"""Video Sparse Attention as functions of tensors: check, prepare, compute.

The kernels' part is one operator known to autograd, torch.compile and CUDA graphs.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnmux.errors import ForwardContextError, UnsupportedRequestError
from attnmux_blocksparse.prepare import compute_dtype, resolve_scale
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
    scale = resolve_scale(softmax_scale, q.shape[3])
    if chosen == "triton":
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
    scale = resolve_scale(softmax_scale, q.shape[3])
    sizes, volume = tiling.variable_block_sizes, math.prod(tiling.tile_size)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        means = [
            tile_means(tile_tokens(x.to(compute_dtype(q.dtype)), tiling.slot_of_token, sizes.shape[0], volume), sizes)
            for x in (q, k)
        ]
        if choose_engine(None, q, volume) == "triton":
            from attnmux_vsa.attend import choose_tiles

            return choose_tiles(means[0].contiguous(), means[1].contiguous(), kept, scale, conform).long()
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
    """The operator by Triton kernels and the block-sparse operator's; arguments are checked."""
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, gate))
    out: torch.Tensor = torch.ops.attnmux_vsa.forward(
        q, k, v, gate, tiling.token_of_slot, tiling.slot_grid, tiling.variable_block_sizes, tiling.tile_size, kept, scale,
        conform, keeps,
    )[0]  # fmt: skip
    return out


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


@torch.library.custom_op("attnmux_vsa::forward", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    token_of_slot: torch.Tensor,
    slot_grid: torch.Tensor,
    tile_sizes: torch.Tensor,
    tile: list[int],
    topk: int,
    scale: float,
    conform: str | None,
    keeps: bool,
) -> list[torch.Tensor]:
    from attnmux_vsa import attend

    geometry = attend.Geometry(token_of_slot, slot_grid, tile_sizes, (tile[0], tile[1], tile[2]))
    return list(attend.forward(q, k, v, gate, geometry, topk, scale, conform, keeps=keeps))


@_forward_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    token_of_slot: torch.Tensor,
    slot_grid: torch.Tensor,
    tile_sizes: torch.Tensor,
    tile: list[int],
    topk: int,
    scale: float,
    conform: str | None,
    keeps: bool,
) -> list[torch.Tensor]:
    batch, _, heads, head_size = q.shape
    n_tiles, n_slots, heads_k = tile_sizes.shape[0], token_of_slot.shape[0], k.shape[2]
    has_coarse = keeps and gate is not None
    out = q.new_empty(q.shape)
    fine = q.new_empty(batch, n_slots, heads, head_size) if has_coarse else q.new_empty(0)
    lse = q.new_empty(batch, heads, n_slots, dtype=torch.float32)
    blocks = q.new_empty(batch, heads, n_tiles, topk, dtype=torch.int32)
    means = [
        q.new_empty(batch, n, n_tiles, head_size, dtype=torch.float32)
        if has_coarse
        else q.new_empty(0, dtype=torch.float32)
        for n in (heads, heads_k, heads_k, heads)
    ]
    coarse_lse = q.new_empty((batch, heads, n_tiles) if has_coarse else 0, dtype=torch.float32)
    return [out, fine, lse, blocks, *means, coarse_lse]


@torch.library.custom_op("attnmux_vsa::backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    kept: list[torch.Tensor],
    token_of_slot: torch.Tensor,
    slot_grid: torch.Tensor,
    tile_sizes: torch.Tensor,
    tile: list[int],
    scale: float,
) -> list[torch.Tensor]:
    from attnmux_vsa import attend

    geometry = attend.Geometry(token_of_slot, slot_grid, tile_sizes, (tile[0], tile[1], tile[2]))
    grads = attend.backward(dout, q, k, v, gate, attend.Forward(*kept), geometry, scale)
    return [grad for grad in grads if grad is not None]


@_backward_op.register_fake
def _(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor | None, *_: Any
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, gate) if x is not None]


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    q, k, v, gate, token_of_slot, slot_grid, tile_sizes, tile, _topk, scale, _conform, keeps = inputs
    out, fine, *rest = output
    # With a gate the fine branch is what the backward takes; the output is not kept then.
    ctx.save_for_backward(q, k, v, gate, fine if gate is not None else out, *rest, token_of_slot, slot_grid, tile_sizes)
    ctx.tile, ctx.scale, ctx.keeps = tile, scale, keeps
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    if grads[0] is None:
        return (None,) * 12
    if not ctx.keeps:
        raise RuntimeError("attnmux_vsa::forward ran with keeps=False, after which there is no backward")
    q, k, v, gate, branch, lse, blocks, *means, token_of_slot, slot_grid, tile_sizes = ctx.saved_tensors
    nothing = q.new_empty(0)
    out, fine = (branch, nothing) if gate is None else (nothing, branch)
    found = torch.ops.attnmux_vsa.backward(
        grads[0],
        q,
        k,
        v,
        gate,
        [out, fine, lse, blocks, *means],
        token_of_slot,
        slot_grid,
        tile_sizes,
        ctx.tile,
        ctx.scale,
    )
    return (*found[:3], found[3] if gate is not None else None, *(None,) * 8)


torch.library.register_autograd("attnmux_vsa::forward", _backward, setup_context=_save_forward)
