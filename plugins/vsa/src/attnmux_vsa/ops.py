"""Video Sparse Attention as functions of tensors: check, prepare, compute."""

from __future__ import annotations

import math

import torch

from attnmux.errors import ForwardContextError, UnsupportedRequestError
from attnmux_vsa.prepare import VideoTiling, resolve_topk, tile_tokens
from attnmux_vsa.reference import keep_top_tiles, score_tiles, video_sparse_attention_reference

__all__ = ["ENGINES", "select_tiles", "video_sparse_attention"]

ENGINES = ("reference",)
"""What can compute the operator; None picks among them."""

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
        engine: One of `ENGINES`, or None.

    Returns:
        `[B, S, H, D]` in the dtype of q, contiguous.

    Raises:
        ForwardContextError: There is no metadata.
        UnsupportedRequestError: The metadata is of another kind; shapes, dtypes or devices do not go together; S is not
            the T * H * W of the grid; a number is out of its range; the engine is unknown.

    Numerics:
        Pooled means, scores, softmax and sums in float32 (float64 for float64 inputs), rounded once to the dtype of q.
        With every tile kept and no gate this is dense softmax attention.

    Source:
        VSA, arXiv 2505.13389; see `reference` for the formulas and for what differs from the published code.
    """
    if engine is not None and engine not in ENGINES:
        raise UnsupportedRequestError(
            f"engine={engine!r} is unknown to VIDEO_SPARSE_ATTN; expected None or one of {', '.join(ENGINES)}"
        )
    tiling = _check_call(q, k, metadata, v=v)
    if gate_compress is not None:
        _check_like_q("gate_compress", gate_compress, q, (q.shape[0], q.shape[1], q.shape[2], q.shape[3]))
    return video_sparse_attention_reference(
        q,
        k,
        v,
        slot_of_token=tiling.slot_of_token,
        tile_sizes=tiling.variable_block_sizes,
        tile_volume=math.prod(tiling.tile_size),
        topk=_resolve_topk(topk, sparsity, tiling),
        softmax_scale=_resolve_scale(softmax_scale, q.shape[3]),
        gate_compress=gate_compress,
    )


def select_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    metadata: VideoTiling | None,
    *,
    topk: int | None = None,
    sparsity: float | None = None,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Return which key tiles each query tile keeps, as `video_sparse_attention` chooses them.

    Args:
        q: `[B, S, H, D]`, as for `video_sparse_attention`.
        k: `[B, S, H_kv, D]`, likewise.
        metadata: The grid and its tables; `metadata.slot_of_token // M` is the tile of every raster token.
        topk: Key tiles kept, in [1, N]; None = as the metadata says.
        sparsity: Fraction of key tiles left out, in [0, 1]; instead of `topk`.
        softmax_scale: Factor on the scores; its sign and zero matter for the choice.

    Returns:
        `[B, H, N, topk]`, int64, ascending.

    Raises:
        ForwardContextError: There is no metadata.
        UnsupportedRequestError: As for `video_sparse_attention`.
    """
    tiling = _check_call(q, k, metadata)
    kept = _resolve_topk(topk, sparsity, tiling)
    scale = _resolve_scale(softmax_scale, q.shape[3])
    sizes = tiling.variable_block_sizes
    compute_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        q_tiles, k_tiles = (
            tile_tokens(x.to(compute_dtype), tiling.slot_of_token, sizes.shape[0], math.prod(tiling.tile_size))
            for x in (q, k)
        )
        return keep_top_tiles(score_tiles(q_tiles, k_tiles, sizes, scale), kept)


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


def _check_call(q: torch.Tensor, k: torch.Tensor, metadata: object, *, v: torch.Tensor | None = None) -> VideoTiling:
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
