"""Video Sparse Attention by its definition, in plain differentiable PyTorch, on any device.

Tokens are cut into N tiles. With the means q', k', v' of every tile over its tokens and the scale s, per head:

    scores[i, j] = s * q'_i . k'_j                                          tile against tile
    kept(i)      = the topk tiles j of the largest scores[i, j]             at equal scores the lower j
    coarse_i     = sum_j softmax_j(scores[i, :]) v'_j                       one vector for the tile
    fine_a       = sum_b softmax_b(s * q_a . k_b) v_b                       over the tokens b of kept(tile of a)
    out_a        = fine_a + gate_a * coarse_(tile of a)                     without a gate: fine_a

The choice of tiles carries no gradient; q, k, v and the gate get theirs through everything else.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from attnmux_blocksparse.prepare import compute_dtype
from attnmux_vsa.prepare import tile_tokens, untile_tokens, valid_slots

__all__ = ["CONFORM", "attend_tiles", "keep_top_tiles", "score_means", "tile_means", "video_sparse_attention_reference"]

CONFORM = ("bf16-scores",)
"""Ways to choose tiles that other implementations have."""

# Most numbers that one chunk of query tiles may gather of k, and again of v, if it kept every tile (256 MB in float32).
# The bound does not depend on topk, so that a sparsity schedule runs the same number of chunks throughout.
_CHUNK_NUMBERS = 2**26


def video_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    slot_of_token: torch.Tensor,
    tile_sizes: torch.Tensor,
    tile_volume: int,
    topk: int,
    softmax_scale: float,
    gate_compress: torch.Tensor | None = None,
    conform: str | None = None,
) -> torch.Tensor:
    """Return Video Sparse Attention of raster tokens; arguments are taken as valid (`ops` checks them).

    Args:
        q: `[B, S, H, D]`, floating, any strides; not modified.
        k: `[B, S, H_kv, D]`, like q; H is a multiple of H_kv, and query head h reads key head `h // (H // H_kv)`.
        v: `[B, S, H_kv, D]`, like k.
        slot_of_token: Slot by raster position, int64 `[S]`.
        tile_sizes: Tokens of every tile, integer `[N]`, each in [1, tile_volume].
        tile_volume: Slots of a tile, M.
        topk: Tiles kept per query tile and query head, in [1, N].
        softmax_scale: Factor on the scores of both branches; any finite number.
        gate_compress: `[B, S, H, D]`, factor on the coarse branch, used as it is; None leaves the branch out.
        conform: None, or one of `CONFORM`: by which scores tiles are chosen.

    Returns:
        `[B, S, H, D]` in the dtype of q.

    Numerics:
        Everything is computed in float32, in float64 for float64 inputs, and autocast has no say in it.

    Source:
        VSA (arXiv 2505.13389), section 2. As in its published code, the fine branch has no gate and the coarse softmax
        counts a short tile like a full one. Unlike there: scores are float32 rather than rounded to the input dtype;
        the kept tiles are exactly topk; the scale can be chosen; no gate means no coarse branch.
    """
    num_tiles, dtype = tile_sizes.shape[0], compute_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q_tiles, k_tiles, v_tiles = (tile_tokens(x.to(dtype), slot_of_token, num_tiles, tile_volume) for x in (q, k, v))
        fine, coarse = attend_tiles(
            q_tiles,
            k_tiles,
            v_tiles,
            tile_sizes,
            topk,
            softmax_scale,
            with_coarse=gate_compress is not None,
            conform=conform,
        )
        out = untile_tokens(fine, slot_of_token)
        if gate_compress is not None and coarse is not None:
            of_every_token = coarse.unsqueeze(3).expand_as(fine)
            out = out + gate_compress.to(dtype) * untile_tokens(of_every_token, slot_of_token)
    return out.to(q.dtype)


def attend_tiles(
    q_tiles: torch.Tensor,
    k_tiles: torch.Tensor,
    v_tiles: torch.Tensor,
    tile_sizes: torch.Tensor,
    topk: int,
    softmax_scale: float,
    *,
    with_coarse: bool,
    conform: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the fine branch `[B, H, N, M, D]` and, if asked for, the coarse branch `[B, H, N, D]`.

    Args:
        q_tiles: `[B, H, N, M, D]`; what lies in the padding, NaN included, is never read.
        k_tiles: `[B, H_kv, N, M, D]`, likewise.
        v_tiles: `[B, H_kv, N, M, D]`, likewise.
        tile_sizes: Tokens of every tile, integer `[N]`.
        topk: Tiles kept per query tile and query head.
        softmax_scale: Factor on the scores of both branches.
        with_coarse: Whether the coarse branch is wanted.
        conform: None, or one of `CONFORM`.
    """
    valid = valid_slots(tile_sizes, q_tiles.shape[3])  # [N, M]
    q_tiles, k_tiles, v_tiles = (x.where(valid[..., None], 0.0) for x in (q_tiles, k_tiles, v_tiles))
    means = tile_means(q_tiles, tile_sizes), tile_means(k_tiles, tile_sizes)
    scores = score_means(*means, softmax_scale)
    choice = scores if conform is None else score_means(*means, softmax_scale, conform=conform)
    fine = _fine_branch(q_tiles, k_tiles, v_tiles, valid, keep_top_tiles(choice, topk), softmax_scale)
    if not with_coarse:
        return fine, None
    values = _per_query_head(tile_means(v_tiles, tile_sizes), q_tiles.shape[1])
    return fine, torch.softmax(scores, dim=-1) @ values


def score_means(
    q_means: torch.Tensor, k_means: torch.Tensor, softmax_scale: float, *, conform: str | None = None
) -> torch.Tensor:
    """Return the scores `[B, H, N, N]` of query tiles against key tiles, from their means `[B, H, N, D]`.

    `conform="bf16-scores"` gives those of the published code: means, products and scaled scores each rounded to bfloat16.
    """
    if conform is not None:
        q_means, k_means = q_means.to(torch.bfloat16), k_means.to(torch.bfloat16)
    keys = _per_query_head(k_means, q_means.shape[1])
    return (q_means @ keys.transpose(-1, -2)) * softmax_scale


def keep_top_tiles(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Return the indices `[..., topk]`, ascending, of the `topk` largest scores of every row `[..., N]`.

    Always exactly `topk` different tiles. At equal scores the lower index is kept. NaN counts as the largest score: a
    tile with a NaN is attended, so that the NaN shows in the output as it does in dense attention.
    """
    # A stable sort keeps equal scores in the order of their index, which torch.topk does not promise.
    best_first = torch.sort(scores.detach(), dim=-1, descending=True, stable=True).indices
    return best_first[..., :topk].sort(dim=-1).values


def tile_means(tiles: torch.Tensor, tile_sizes: torch.Tensor) -> torch.Tensor:
    """Average tiles `[B, H, N, M, D]` with zero padding over their tokens, to `[B, H, N, D]`."""
    return tiles.sum(dim=3) / tile_sizes[:, None]


def _per_query_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeat the key heads of `[B, H_kv, ...]` so that each query head has its own."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _fine_branch(
    q_tiles: torch.Tensor,
    k_tiles: torch.Tensor,
    v_tiles: torch.Tensor,
    valid: torch.Tensor,
    kept: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """Attend from the tokens of every query tile to the tokens of its kept tiles `[B, H, N, topk]`."""
    B, H, N, M, D = q_tiles.shape
    # A row is one query tile of one head of one sample; rows of tokens are gathered, so no [S, S] mask is ever made.
    queries = q_tiles.flatten(0, 2)  # [B * H * N, M, D]
    keys, values = k_tiles.flatten(0, 2), v_tiles.flatten(0, 2)  # [B * H_kv * N, M, D]
    kept = kept.flatten(0, 2)  # [B * H * N, topk]
    first_tile = torch.arange(B * H * N, device=kept.device) // (N * (H // k_tiles.shape[1])) * N

    def attend(rows: slice) -> torch.Tensor:
        gathered = first_tile[rows, None] + kept[rows]  # [R, topk]
        # Indexing, not index_select: its backward adds up in a fixed order on a GPU too.
        chunk_keys, chunk_values = keys[gathered].flatten(1, 2), values[gathered].flatten(1, 2)  # [R, topk * M, D]
        scores = (queries[rows] * softmax_scale) @ chunk_keys.transpose(1, 2)  # [R, M, topk * M]
        # Every tile holds a token, so no row is masked throughout.
        visible = valid[kept[rows]].flatten(1)[:, None]  # [R, 1, topk * M]
        return torch.softmax(scores.masked_fill_(~visible, float("-inf")), dim=-1) @ chunk_values

    num_rows = queries.shape[0]
    step = max(1, _CHUNK_NUMBERS // (N * M * max(M, D)))
    if num_rows <= step:
        return attend(slice(0, num_rows)).view(B, H, N, M, D)
    # Backward gathers a chunk again instead of keeping what every chunk gathered.
    recompute = torch.is_grad_enabled() and (keys.requires_grad or queries.requires_grad or values.requires_grad)
    chunks = []
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        if recompute:
            chunks.append(checkpoint(attend, rows, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(attend(rows))
    return torch.cat(chunks).view(B, H, N, M, D)
