"""How a video is cut into chunks, in which order their tokens stand, and what a choice of chunks is.

A video is a grid of `T x H x W` tokens in raster order (`w` fastest). A chunk is a box of tokens:

    1-D (temporal)        c frames, a number that may be a fraction: a run of int(c * H * W) tokens; the last one may be short
    2-D (spatial)         (h, w): h x w columns of tokens through all frames; h divides H, w divides W
    3-D (spatio-temporal) (t, h, w): each divides its axis

Chunk order: chunk after chunk (W fastest), raster order inside a chunk. A 1-D chunk is a box in a grid of one axis, so that
one pair (grid, box) describes every kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from attnmux.errors import UnsupportedRequestError

__all__ = [
    "COUPLES_HEADS",
    "SCOPES",
    "SELECT_MODES",
    "ChunkGrid",
    "Selection",
    "check_selection",
    "from_chunk_order",
    "pack_bits",
    "process_moba_input",
    "process_moba_output",
    "resolve_chunks",
    "self_chunks",
    "to_chunk_order",
    "token_grid",
    "unpack_bits",
]

Triple = tuple[int, int, int]
ChunkSize = int | float | Sequence[int]

SELECT_MODES = ("topk", "threshold")
SCOPES = {
    "topk": ("query_head", "head_global", "overall"),
    "threshold": ("query_head", "head_global", "overall", "block"),
}
"""Scopes by mode: over what the budget of one choice extends."""
COUPLES_HEADS = ("overall", "block")
"""Scopes whose choice for one head depends on the others."""

_AXES = ("T", "H", "W")
_BITS = 32


class ChunkGrid(NamedTuple):
    """A grid of tokens cut into boxes.

    Attributes:
        grid: Tokens along the three axes; (1, 1, S) for 1-D chunks.
        box: Tokens of a chunk along them. Only a 1-D chunk may leave a short last one.
    """

    grid: Triple
    box: Triple

    @property
    def length(self) -> int:
        """Tokens of the video, S."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a full chunk."""
        return self.box[0] * self.box[1] * self.box[2]

    @property
    def chunks_along(self) -> Triple:
        """Chunks along the three axes."""
        (t, h, w), (box_t, box_h, box_w) = self.grid, self.box
        return (-(-t // box_t), -(-h // box_h), -(-w // box_w))

    @property
    def num_chunks(self) -> int:
        """Chunks of the video, C, a short one included."""
        t, h, w = self.chunks_along
        return t * h * w

    @property
    def is_raster(self) -> bool:
        """Whether chunk order is raster order by its kind (a 1-D chunk)."""
        return self.grid[0] == 1 and self.grid[1] == 1


class Selection(NamedTuple):
    """How chunks are chosen.

    Attributes:
        mode: "topk" or "threshold".
        scope: "query_head": each query of each head by itself; "head_global": the queries of a head share one budget;
            "overall": those of all heads; "block" (threshold only): the queries and heads that look at one chunk share one.
        topk: Chunks per query, its own included, >= 1; capped at the number of chunks.
        threshold: Share of the normalised gates that is kept, in [0, 1].
        keeps_one: Published quirk: where a threshold is met by the own chunks alone, one more entry is kept.
    """

    mode: str = "topk"
    scope: str = "query_head"
    topk: int = 1
    threshold: float = 0.25
    keeps_one: bool = False


def check_selection(mode: str, scope: str, topk: int, threshold: float) -> None:
    """Raise unless the four describe a choice of chunks.

    Raises:
        UnsupportedRequestError: Names the argument, what came and what is supported.
    """
    if mode not in SELECT_MODES:
        raise UnsupportedRequestError(f"select mode {mode!r} is not known; expected one of {', '.join(SELECT_MODES)}")
    if scope not in SCOPES[mode]:
        hint = (
            "'block' shares one budget among the queries of a chunk and exists with mode 'threshold' alone: a top-k of a "
            "chunk would keep every query or leave the chunk out. "
            if scope == "block"
            else ""
        )
        raise UnsupportedRequestError(
            f"scope {scope!r} is not supported with mode {mode!r}; {hint}expected one of {', '.join(SCOPES[mode])}"
        )
    if not isinstance(topk, int) or isinstance(topk, bool) or topk < 1:
        raise UnsupportedRequestError(
            f"topk={topk!r} is the number of chunks per query, its own included, and must be an integer >= 1"
        )
    if not 0.0 <= threshold <= 1.0:
        raise UnsupportedRequestError(f"threshold={threshold!r} is a share of the gates and must lie in [0, 1]")


def token_grid(raw_latent_shape: Sequence[int], patch_size: Sequence[int]) -> Triple:
    """Return the grid (T, H, W) of tokens that a patch embedding makes of a latent video.

    Raises:
        UnsupportedRequestError: A size is no integer >= 1, or the patch does not divide an axis.
    """
    latent, patch = checked_sizes("raw_latent_shape", raw_latent_shape, 3), checked_sizes("patch_size", patch_size, 3)
    for axis, size, step in zip(_AXES, latent, patch, strict=True):
        if size % step:
            raise UnsupportedRequestError(
                f"axis {axis} of the latent has size {size}, which the patch size {step} does not divide "
                f"(raw_latent_shape={latent}, patch_size={patch}); pad or crop the latent to a multiple of {step}"
            )
    return (latent[0] // patch[0], latent[1] // patch[1], latent[2] // patch[2])


def checked_sizes(name: str, value: Any, count: int) -> Any:
    """Return `count` integers >= 1 as a tuple, or raise with the argument's name."""
    sizes = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if len(sizes) != count or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise UnsupportedRequestError(
            f"{name} must be {count} integers >= 1 along {', '.join(_AXES[3 - count :])}; got {value!r}"
        )
    return sizes


def resolve_chunks(patch_resolution: Sequence[int], chunk_size: ChunkSize) -> ChunkGrid:
    """Return the chunks of a grid.

    Args:
        patch_resolution: Tokens along T, H and W, each >= 1.
        chunk_size: Frames of a 1-D chunk, > 0 (a fraction takes whole tokens, rounded down); (h, w) of a 2-D one;
            (t, h, w) of a 3-D one.

    Raises:
        UnsupportedRequestError: A size is out of range, or a box does not divide its axis, which is named.
    """
    grid: Triple = checked_sizes("patch_resolution", patch_resolution, 3)
    if isinstance(chunk_size, (int, float)) and not isinstance(chunk_size, bool):
        tokens = int(chunk_size * grid[1] * grid[2]) if math.isfinite(chunk_size) else 0
        if tokens < 1:
            raise UnsupportedRequestError(
                f"a 1-D chunk of {chunk_size!r} frames of {grid[1]} x {grid[2]} tokens holds no token; give more frames"
            )
        length = math.prod(grid)
        return ChunkGrid((1, 1, length), (1, 1, min(tokens, length)))
    sizes = tuple(chunk_size) if isinstance(chunk_size, Sequence) else ()
    if len(sizes) not in (2, 3):
        raise UnsupportedRequestError(
            f"chunk_size={chunk_size!r} must be a number of frames, (h, w) or (t, h, w) tokens"
        )
    sizes = checked_sizes("chunk_size", sizes, len(sizes))
    box: Triple = sizes if len(sizes) == 3 else (grid[0], *sizes)
    for axis, size, step in zip(_AXES, grid, box, strict=True):
        if size % step:
            raise UnsupportedRequestError(
                f"axis {axis} of the video has {size} tokens, which the chunk's {step} do not divide "
                f"(patch_resolution={grid}, chunk_size={chunk_size!r}); choose a divisor of {size}"
            )
    return ChunkGrid(grid, box)


def to_chunk_order(x: torch.Tensor, chunks: ChunkGrid) -> torch.Tensor:
    """Put raster tokens `[B, S, ...]` in chunk order, the same shape; 1-D chunks give x itself."""
    if chunks.is_raster:
        return x
    (n_t, n_h, n_w), (t, h, w) = chunks.chunks_along, chunks.box
    boxes = x.reshape(x.shape[0], n_t, t, n_h, h, n_w, w, *x.shape[2:])
    return boxes.permute(0, 1, 3, 5, 2, 4, 6, *range(7, boxes.dim())).reshape(x.shape)


def from_chunk_order(x: torch.Tensor, chunks: ChunkGrid) -> torch.Tensor:
    """Put tokens `[B, S, ...]` in chunk order back in raster order: the inverse of `to_chunk_order`."""
    if chunks.is_raster:
        return x
    (n_t, n_h, n_w), (t, h, w) = chunks.chunks_along, chunks.box
    boxes = x.reshape(x.shape[0], n_t, n_h, n_w, t, h, w, *x.shape[2:])
    return boxes.permute(0, 1, 4, 2, 5, 3, 6, *range(7, boxes.dim())).reshape(x.shape)


def process_moba_input(
    x: torch.Tensor, patch_resolution: Sequence[int], chunk_size: ChunkSize
) -> tuple[torch.Tensor, int]:
    """Put raster tokens in chunk order.

    Args:
        x: `[B, S, ...]`, S = T * H * W, any dtype, device and strides.
        patch_resolution: Tokens along T, H and W.
        chunk_size: As for `resolve_chunks`.

    Returns:
        The tokens in chunk order, `[B, S, ...]`, and the tokens of a full chunk.

    Raises:
        UnsupportedRequestError: As `resolve_chunks`, or S is another number.
    """
    chunks = _chunks_of(x, patch_resolution, chunk_size)
    return to_chunk_order(x, chunks), chunks.chunk_tokens


def process_moba_output(x: torch.Tensor, patch_resolution: Sequence[int], chunk_size: ChunkSize) -> torch.Tensor:
    """Put tokens `[B, S, ...]` in chunk order back in raster order; arguments as for `process_moba_input`."""
    return from_chunk_order(x, _chunks_of(x, patch_resolution, chunk_size))


def _chunks_of(x: torch.Tensor, patch_resolution: Sequence[int], chunk_size: ChunkSize) -> ChunkGrid:
    chunks = resolve_chunks(patch_resolution, chunk_size)
    if x.dim() < 2 or x.shape[1] != chunks.length:
        raise UnsupportedRequestError(
            f"x must be [B, S, ...] with S = {chunks.length} tokens of the grid {tuple(patch_resolution)}; got "
            f"{tuple(x.shape)}"
        )
    return chunks


def self_chunks(chunks: ChunkGrid, device: torch.device) -> torch.Tensor:
    """Return which chunk is a token's own: bool `[C, S]`, tokens in chunk order."""
    own = torch.arange(chunks.length, device=device) // chunks.chunk_tokens
    return torch.arange(chunks.num_chunks, device=device)[:, None] == own


def pack_bits(chosen: torch.Tensor) -> torch.Tensor:
    """Pack a choice, bool `[B, H, C, S]`, into int32 words `[B, H, ceil(C / 32), S]`: chunk c is bit c % 32 of word c // 32."""
    B, H, C, S = chosen.shape
    padded = torch.nn.functional.pad(chosen, (0, 0, 0, -C % _BITS)).reshape(B, H, -1, _BITS, S)
    weights = (torch.ones(_BITS, dtype=torch.int64, device=chosen.device) << torch.arange(_BITS, device=chosen.device))[
        :, None
    ]
    words = (padded * weights).sum(3)
    # bit 31 is the sign of an int32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_bits(words: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Return the choice that `pack_bits` packed, bool `[B, H, C, S]`."""
    shifts = torch.arange(_BITS, device=words.device, dtype=torch.int32)[:, None]
    return ((words[:, :, :, None] >> shifts) & 1).flatten(2, 3)[:, :, :num_chunks].bool()
