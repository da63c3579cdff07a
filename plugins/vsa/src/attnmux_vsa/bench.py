"""Cases of VIDEO_SPARSE_ATTN for `attnmux bench` and `benchmarks/vsa.py`: grids and ways to cut them, a tenth of the tiles kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnmux.bench import Case, Prepared, draw_inputs
from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse.bench import small_grid
from attnmux_vsa.backend import VideoSparseAttentionMetadata
from attnmux_vsa.ops import select_tiles
from attnmux_vsa.prepare import VSA_TILE_SIZE, VideoTiling, build_video_tiling

if TYPE_CHECKING:
    from attnmux_vsa.prepare import Triple

__all__ = ["CASES", "VIDEOS", "TilePattern", "Video", "make_tiling", "prepare"]

KEEP = 0.1


@dataclass(frozen=True)
class Video:
    """A grid of tokens (T, H, W) and how it is cut."""

    grid: Triple
    tile_size: Triple = VSA_TILE_SIZE
    tile_policy: str = "grid"

    @property
    def name(self) -> str:
        """Words for the tile and the policy, such as "vsa_444_adaptive"."""
        parts = ("vsa", "".join(map(str, self.tile_size)), "" if self.tile_policy == "grid" else self.tile_policy)
        return "_".join(part for part in parts if part)

    def case(self) -> Case:
        """Return the case; its kind of lists is the grid."""
        volume = math.prod(self.tile_size)
        return Case(
            name=self.name,
            S_q=math.prod(self.grid),
            keep=KEEP,
            block_q=volume,
            block_k=volume,
            lists="x".join(map(str, self.grid)),
        )


VIDEOS = (
    Video((32, 32, 32)),
    Video((32, 32, 32), (4, 8, 8)),
    Video((20, 48, 80)),
    Video((21, 30, 52)),
    Video((21, 30, 52), tile_policy="adaptive"),
    Video((8, 32, 32)),
    Video((32, 32, 32), (4, 4, 8)),
)
"""Whole and partial tiles at the lengths of Wan 2.1; 8,192 tokens, where dense attention is near."""

CASES = {"VIDEO_SPARSE_ATTN": tuple(video.case() for video in VIDEOS)}
"""Cases by backend, as `attnmux.bench` looks them up."""


def make_tiling(case: Case, device: torch.device) -> VideoTiling:
    """Return the tiling of a case.

    Raises:
        UnsupportedRequestError: It is none of `VIDEOS`, whole or shrunk.
    """
    known = {(video.name, video.case().lists): video for video in VIDEOS}
    video = known.get((case.name, case.lists))
    if video is None:
        raise UnsupportedRequestError(f"case {case.name!r} with lists={case.lists!r} is not one of {list(known)}")
    grid = video.grid if math.prod(video.grid) == case.S_q else small_grid(case.S_q)
    return build_video_tiling(
        grid, sparsity=1 - case.keep, tile_size=video.tile_size, tile_policy=video.tile_policy, device=device
    )


def prepare(backend: str, case: Case, device: torch.device) -> Prepared:
    """Return metadata and pattern of a case, without a gate.

    Args:
        backend: "VIDEO_SPARSE_ATTN".
        case: What is to be measured.
        device: Where the inputs live.
    """
    tiling = make_tiling(case, device)
    q, k, _ = draw_inputs(case, device)
    metadata = VideoSparseAttentionMetadata(current_timestep=0, **vars(tiling))
    return Prepared(TilePattern(tiling, select_tiles(q, k, tiling)), metadata)


class TilePattern:
    """Which keys the kept tiles mean; the `Pattern` of the correctness gate.

    Args:
        tiling: Of the tokens.
        kept: Kept tiles `[B, H, N, topk]`.
    """

    def __init__(self, tiling: VideoTiling, kept: torch.Tensor) -> None:
        self._tile = tiling.slot_of_token // math.prod(tiling.tile_size)
        self._sizes = tiling.variable_block_sizes
        self._kept = kept

    def visible(self, batch: int, head: int, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return bool `[len(rows), len(keys)]` for positions of queries and keys."""
        n_tiles = len(self._sizes)
        mask = torch.zeros(n_tiles, n_tiles, dtype=torch.bool, device=rows.device)
        mask.scatter_(1, self._kept[batch, head], True)
        return mask[self._tile[rows]].index_select(1, self._tile[keys])

    def pairs(self) -> int:
        """Return how many pairs of query and key attend, over all samples and query heads."""
        tokens = self._sizes.long()
        return int((tokens[self._kept].sum(-1) * tokens).sum())
