"""Where every token of a video sits among the tiles, and how many tiles are kept.

A video is a grid of `T x H x W` tokens in raster order (`w` fastest). Tiles of `tile_size` tokens cover it from its
origin; the last tile of an axis is short where the axis is no multiple of the tile. Three numberings of the tokens:

    raster   position in the sequence, 0 .. S-1
    tiled    the same tokens, tile after tile, raster order inside a tile, 0 .. S-1
    slot     tile * M + position in its tile, 0 .. N*M-1, with M = the tokens of a full tile

A short tile fills the first slots of its M, the rest is padding. N counts every tile, short ones too.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attnmux.errors import UnsupportedRequestError

__all__ = [
    "TILE_POLICIES",
    "VSA_TILE_SIZE",
    "TileTables",
    "VideoTiling",
    "adaptive_tiles",
    "build_video_tiling",
    "construct_variable_block_sizes",
    "count_kept_tiles",
    "count_tiles",
    "get_non_pad_index",
    "get_reverse_tile_partition_indices",
    "get_tile_partition_indices",
    "get_tile_tables",
    "tile_tokens",
    "token_grid",
    "untile_tokens",
]

VSA_TILE_SIZE = (4, 4, 4)
"""Tokens of one tile along T, H and W: the tile of the published checkpoints."""

TILE_POLICIES = ("grid", "adaptive")
"""How a grid is cut where the tile does not divide it; see `build_video_tiling`."""

Triple = tuple[int, int, int]

_AXES = ("T", "H", "W")

# Tables of one grid weigh 32 bytes a token, 2.4 MB for 81 frames at 720p: sixteen grids stay a small, fixed cost.
_CACHED_GRIDS = 16


def count_tiles(dit_seq_shape: Triple, tile_size: Triple = VSA_TILE_SIZE) -> Triple:
    """Return the tiles along T, H and W, short ones included.

    Raises:
        UnsupportedRequestError: A grid or tile is not three integers >= 1.
    """
    grid, tile = _triple("dit_seq_shape", dit_seq_shape), _triple("tile_size", tile_size)
    return (-(-grid[0] // tile[0]), -(-grid[1] // tile[1]), -(-grid[2] // tile[2]))


def token_grid(raw_latent_shape: Triple, patch_size: Triple) -> Triple:
    """Return the grid (T, H, W) of tokens that a patch embedding makes of a latent video.

    Args:
        raw_latent_shape: Latent frames, rows and columns, each >= 1.
        patch_size: Latent frames, rows and columns of one token, each >= 1.

    Raises:
        UnsupportedRequestError: An axis of the latent is no multiple of the patch: the tokens that a model makes of
            such a latent would not be the ones the grid describes.
    """
    latent, patch = _triple("raw_latent_shape", raw_latent_shape), _triple("patch_size", patch_size)
    for axis, size, step in zip(_AXES, latent, patch, strict=True):
        if size % step:
            raise UnsupportedRequestError(
                f"axis {axis} of the latent has size {size}, which the patch size {step} does not divide "
                f"(raw_latent_shape={latent}, patch_size={patch}); pad or crop the latent to a multiple of {step}"
            )
    return (latent[0] // patch[0], latent[1] // patch[1], latent[2] // patch[2])


def count_kept_tiles(sparsity: float, num_tiles: int) -> int:
    """Return how many key tiles each query tile keeps: `max(1, min(ceil((1 - sparsity) * num_tiles), num_tiles))`.

    Args:
        sparsity: Fraction of key tiles left out, in [0, 1].
        num_tiles: Tiles of the grid, >= 1, short ones included.

    Raises:
        UnsupportedRequestError: `sparsity` is NaN or outside [0, 1].

    Numerics:
        In Python floats, as published: 1 - 0.7 is a little more than 0.3, so 10 tiles at 0.7 keep 4 of them.
        Checkpoints were trained with this count; pass `topk` where another one is meant.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise UnsupportedRequestError(
            f"sparsity={sparsity!r} is the fraction of tiles left out and must lie in [0, 1]; 0 keeps every tile"
        )
    return max(1, min(math.ceil((1 - sparsity) * num_tiles), num_tiles))


def check_topk(topk: int, num_tiles: int) -> int:
    """Return `topk` if it is a number of tiles that a grid of `num_tiles` can keep, else raise."""
    if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= num_tiles:
        raise UnsupportedRequestError(
            f"topk={topk!r} is the number of key tiles kept per query tile and must be an integer in [1, {num_tiles}], "
            "the tiles of this grid"
        )
    return topk


def get_tile_partition_indices(
    dit_seq_shape: Triple, tile_size: Triple = VSA_TILE_SIZE, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return the raster position of every token in tiled order.

    Args:
        dit_seq_shape: Tokens along T, H and W, each >= 1.
        tile_size: Tokens of a tile along T, H and W, each >= 1.
        device: Where the result lives.

    Returns:
        Permutation `[S]`, int64: `x[:, indices]` puts tokens `[B, S, ...]` in tiled order.

    Raises:
        UnsupportedRequestError: A grid or tile is not three integers >= 1.
    """
    tile_of_token = _tile_of_token(dit_seq_shape, tile_size)
    # A stable sort leaves the tokens of one tile in raster order.
    return torch.argsort(tile_of_token, stable=True).to(device)


def get_reverse_tile_partition_indices(
    dit_seq_shape: Triple, tile_size: Triple = VSA_TILE_SIZE, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return the tiled position of every token in raster order: the inverse of `get_tile_partition_indices`.

    Returns:
        Permutation `[S]`, int64: `tiled[:, indices]` puts tokens in tiled order back in raster order.
    """
    return torch.argsort(get_tile_partition_indices(dit_seq_shape, tile_size)).to(device)


def construct_variable_block_sizes(
    dit_seq_shape: Triple,
    num_tiles: Triple,
    device: torch.device | str = "cpu",
    *,
    tile_size: Triple = VSA_TILE_SIZE,
) -> torch.Tensor:
    """Return the tokens that every tile holds.

    Args:
        dit_seq_shape: Tokens along T, H and W, each >= 1.
        num_tiles: Tiles along T, H and W, as `count_tiles` gives them.
        device: Where the result lives.
        tile_size: Tokens of a full tile along T, H and W.

    Returns:
        `[N]`, int32, in the order of the tiles (W fastest), each in [1, M]; they sum to S.

    Raises:
        UnsupportedRequestError: `num_tiles` are not the tiles of that grid.
    """
    expected = count_tiles(dit_seq_shape, tile_size)
    if tuple(num_tiles) != expected:
        raise UnsupportedRequestError(
            f"num_tiles={tuple(num_tiles)} does not fit: a grid {tuple(dit_seq_shape)} has {expected} tiles of "
            f"{tuple(tile_size)}"
        )
    along = [
        torch.tensor([min(tile, size - start) for start in range(0, size, tile)], dtype=torch.int32)
        for size, tile in zip(dit_seq_shape, tile_size, strict=True)
    ]
    sizes = along[0][:, None, None] * along[1][:, None] * along[2]
    # Memory of its own: torch.compile guards on the shape that a view was made from, so every grid would recompile.
    return sizes.flatten().clone().to(device)


def get_non_pad_index(variable_block_sizes: torch.Tensor, max_block_size: int) -> torch.Tensor:
    """Return the slots that hold a token, in tiled order.

    Args:
        variable_block_sizes: Tokens of every tile, `[N]`, integer, each in [1, max_block_size], any device.
        max_block_size: Slots of a tile, M.

    Returns:
        `[S]`, int64, ascending, on the device of `variable_block_sizes`.
    """
    return valid_slots(variable_block_sizes, max_block_size).flatten().nonzero().flatten()


def valid_slots(variable_block_sizes: torch.Tensor, max_block_size: int) -> torch.Tensor:
    """Return which slots of every tile hold a token: bool `[N, M]`."""
    slots = torch.arange(max_block_size, device=variable_block_sizes.device)
    return slots < variable_block_sizes[:, None]


class TileTables(NamedTuple):
    """Index tables of one grid on one device, shared by everyone who asks for them: do not write into them.

    Attributes:
        tile_partition_indices: Raster position by tiled position, int64 `[S]`.
        reverse_tile_partition_indices: Tiled position by raster position, int64 `[S]`.
        variable_block_sizes: Tokens of every tile, int32 `[N]`.
        non_pad_index: Slot by tiled position, int64 `[S]`.
        slot_of_token: Slot by raster position, int64 `[S]`.
        token_of_slot: Raster position by slot, int32 `[N * M]`, -1 where a slot is padding.
        slot_grid: `slot_of_token` in the shape of the grid, `[T, H, W]`.
    """

    tile_partition_indices: torch.Tensor
    reverse_tile_partition_indices: torch.Tensor
    variable_block_sizes: torch.Tensor
    non_pad_index: torch.Tensor
    slot_of_token: torch.Tensor
    token_of_slot: torch.Tensor
    slot_grid: torch.Tensor


def get_tile_tables(
    dit_seq_shape: Triple, tile_size: Triple, device: torch.device | str, tile_policy: str = "grid"
) -> TileTables:
    """Return the index tables of a grid, the same tensors for the same grid, tile, device and policy.

    The last 16 grids are kept; `clear_tile_tables()` lets go of them.
    """
    place = torch.device(device)
    # An empty tensor knows the index that "cuda" leaves open, and shows whether tensors are real here: those made
    # under a FakeTensorMode must not outlive it.
    probe = torch.empty(0, device=place)
    build = _cached_tables if type(probe) is torch.Tensor else _cached_tables.__wrapped__
    grid, tile = _triple("dit_seq_shape", dit_seq_shape), _triple("tile_size", tile_size)
    return build(grid, tile, probe.device, tile_policy)


def clear_tile_tables() -> None:
    """Let go of the tables that `get_tile_tables` keeps."""
    _cached_tables.cache_clear()


@functools.lru_cache(maxsize=_CACHED_GRIDS)
def _cached_tables(grid: Triple, tile: Triple, device: torch.device, tile_policy: str) -> TileTables:
    volume = math.prod(tile)
    # Tables first made under torch.inference_mode() could never again take part in a backward pass.
    with torch.inference_mode(mode=False):
        if tile_policy == "grid":
            tile_of_token, num_tiles = _tile_of_token(grid, tile), math.prod(count_tiles(grid, tile))
        else:
            tile_of_token, num_tiles = adaptive_tiles(grid, tile)
        # A stable sort leaves the tokens of one tile in raster order.
        partition = torch.argsort(tile_of_token, stable=True)
        reverse = torch.argsort(partition)
        # By sums rather than `bincount` or `nonzero`, whose shapes depend on values: fake tensors have none.
        sizes = torch.zeros(num_tiles, dtype=torch.int32).index_add(
            0, tile_of_token, torch.ones(len(partition), dtype=torch.int32)
        )
        tile_of_tiled = tile_of_token[partition]
        tokens_before = sizes.cumsum(0) - sizes
        slots = tile_of_tiled * volume + torch.arange(len(partition)) - tokens_before[tile_of_tiled]
        tokens = torch.full((num_tiles * volume,), -1, dtype=torch.int32)
        tokens = tokens.index_copy(0, slots, partition.to(torch.int32))
        tables = [table.to(device) for table in (partition, reverse, sizes, slots, slots[reverse], tokens)]
        return TileTables._make([*tables, tables[4].view(grid)])


def adaptive_tiles(grid: Triple, tile: Triple) -> tuple[torch.Tensor, int]:
    """Return the tile of every raster position, int64 `[S]`, and the number of tiles, where short tiles are avoided.

    Each axis is cut into the part that the tile divides and the rest; each of the up to eight boxes that this makes is
    covered by tiles of as many tokens in the shape that needs the fewest of them (at equal numbers the one nearest to a
    cube). A grid that the tile divides has one box, in the tiles of the grid.

    Example: 21 x 30 x 52 tokens take 624 tiles of 4 x 4 x 4, a fifth of whose slots are padding; this way 515.
    """
    cuts = [[(0, size // step * step), (size // step * step, size)] for size, step in zip(grid, tile, strict=True)]
    boxes = [box for box in itertools.product(*cuts) if all(first < last for first, last in box)]
    tile_of_token = torch.empty(grid, dtype=torch.int64)
    num_tiles = 0
    for box in boxes:
        sizes = (box[0][1] - box[0][0], box[1][1] - box[1][0], box[2][1] - box[2][0])
        shape = (
            tile if all(size % step == 0 for size, step in zip(sizes, tile, strict=True)) else _best_tile(sizes, tile)
        )
        place = tuple(slice(first, last) for first, last in box)
        tile_of_token[place] = _tile_of_token(sizes, shape).view(sizes) + num_tiles
        num_tiles += math.prod(count_tiles(sizes, shape))
    return tile_of_token.flatten(), num_tiles


def _best_tile(sizes: Triple, tile: Triple) -> Triple:
    """Return the shape of a tile of as many tokens that covers a box with the fewest tiles."""
    volume = math.prod(tile)
    divisors = [n for n in range(1, volume + 1) if volume % n == 0]
    shapes = [(a, b, volume // a // b) for a in divisors for b in divisors if volume // a % b == 0]
    return min(
        shapes, key=lambda shape: (math.prod(-(-n // m) for n, m in zip(sizes, shape, strict=True)), max(shape), shape)
    )


@dataclass
class VideoTiling:
    """A video's grid cut into tiles, and the number of tiles to keep.

    Attributes:
        dit_seq_shape: Tokens along T, H and W.
        tile_size: Tokens of a full tile along T, H and W.
        num_tiles: Tiles along T, H and W; with adaptive tiles (N, 1, 1).
        total_seq_length: S = T * H * W, in tokens.
        topk: Key tiles that each query tile keeps, in [1, N]; this is what attention goes by.
        sparsity: Fraction of tiles left out that gave `topk`, in [0, 1]; None where `topk` was given.
        device: Where the tables live.
        tile_partition_indices: Raster position by tiled position, int64 `[S]`.
        reverse_tile_partition_indices: Tiled position by raster position, int64 `[S]`.
        variable_block_sizes: Tokens of every tile, int32 `[N]`.
        non_pad_index: Slot by tiled position, int64 `[S]`.
        slot_of_token: Slot by raster position, int64 `[S]`.
        token_of_slot: Raster position by slot, int32 `[N * M]`, -1 where a slot is padding.
        slot_grid: `slot_of_token` in the shape of the grid, `[T, H, W]`.
        tile_policy: "grid" or "adaptive"; see `build_video_tiling`.
        dense_layers: Indices of the layers that keep every tile.
    """

    dit_seq_shape: Triple
    tile_size: Triple
    num_tiles: Triple
    total_seq_length: int
    topk: int
    sparsity: float | None
    device: torch.device
    # Tables follow from the grid: two tilings are equal if their plain fields are.
    tile_partition_indices: torch.Tensor = field(repr=False, compare=False)
    reverse_tile_partition_indices: torch.Tensor = field(repr=False, compare=False)
    variable_block_sizes: torch.Tensor = field(repr=False, compare=False)
    non_pad_index: torch.Tensor = field(repr=False, compare=False)
    slot_of_token: torch.Tensor = field(repr=False, compare=False)
    token_of_slot: torch.Tensor = field(repr=False, compare=False)
    slot_grid: torch.Tensor = field(repr=False, compare=False)
    tile_policy: str = "grid"
    dense_layers: tuple[int, ...] = ()

    @property
    def has_padding(self) -> bool:
        """Whether some tile is short."""
        return math.prod(self.num_tiles) * math.prod(self.tile_size) != self.total_seq_length

    def explain(self) -> str:
        """Return in one paragraph how the grid is cut and what its padding costs."""
        tiles, volume = math.prod(self.num_tiles), math.prod(self.tile_size)
        slots = tiles * volume
        text = (
            f"{' x '.join(map(str, self.dit_seq_shape))} = {self.total_seq_length} tokens in {tiles} tiles of {volume} "
            f"({self.tile_policy}, {' x '.join(map(str, self.tile_size))}), {self.topk} of them kept for each query tile"
        )
        if slots == self.total_seq_length:
            return f"{text}; no padding."
        text += (
            f"; {1 - self.total_seq_length / slots:.1%} of the slots are padding, and "
            f"{1 - (self.total_seq_length / slots) ** 2:.0%} of the products of queries and keys are wasted on it"
        )
        if self.tile_policy == "adaptive":
            return f"{text}."
        saved = adaptive_tiles(self.dit_seq_shape, self.tile_size)[1]
        return f'{text}. tile_policy="adaptive" needs {saved} tiles.'


def build_video_tiling(
    dit_seq_shape: Triple,
    *,
    sparsity: float | None = None,
    topk: int | None = None,
    tile_size: Triple = VSA_TILE_SIZE,
    device: torch.device | str = "cpu",
    tile_policy: str = "grid",
) -> VideoTiling:
    """Return the tiling of a grid.

    Args:
        dit_seq_shape: Tokens along T, H and W, each >= 1.
        sparsity: Fraction of key tiles left out, in [0, 1]; see `count_kept_tiles`.
        topk: Key tiles kept per query tile, in [1, N]; instead of `sparsity`.
        tile_size: Tokens of a full tile along T, H and W, each >= 1.
        device: Where the tables live, the device of q, k and v.
        tile_policy: "grid" covers the grid from its origin by tiles of one shape, as checkpoints were trained; "adaptive"
            covers what the tile does not divide by tiles of other shapes (`adaptive_tiles`), which wastes less work and
            changes nothing on a grid that the tile divides.

    Raises:
        UnsupportedRequestError: Neither or both of `sparsity` and `topk` are given, or an argument is out of range.
    """
    if tile_policy not in TILE_POLICIES:
        raise UnsupportedRequestError(f"tile_policy={tile_policy!r} is not known; expected one of {TILE_POLICIES}")
    num_tiles = count_tiles(dit_seq_shape, tile_size)
    tables = get_tile_tables(dit_seq_shape, tile_size, device, tile_policy)
    if tile_policy == "adaptive":
        # Its tiles follow no grid.
        num_tiles = (tables.variable_block_sizes.shape[0], 1, 1)
    kept = resolve_topk(topk, sparsity, math.prod(num_tiles))
    if kept is None:
        raise UnsupportedRequestError("neither a sparsity nor topk was given; one of them says how many tiles are kept")
    return VideoTiling(
        dit_seq_shape=_triple("dit_seq_shape", dit_seq_shape),
        tile_size=_triple("tile_size", tile_size),
        num_tiles=num_tiles,
        total_seq_length=math.prod(dit_seq_shape),
        topk=kept,
        sparsity=sparsity,
        device=tables.slot_of_token.device,
        tile_policy=tile_policy,
        **tables._asdict(),
    )


def resolve_topk(topk: int | None, sparsity: float | None, num_tiles: int) -> int | None:
    """Return the number of tiles to keep by whichever of the two is given, None if neither is, else raise."""
    if topk is not None and sparsity is not None:
        raise UnsupportedRequestError(
            f"topk={topk!r} and a sparsity of {sparsity!r} both say how many tiles are kept; give one of them"
        )
    if topk is not None:
        return check_topk(topk, num_tiles)
    return None if sparsity is None else count_kept_tiles(sparsity, num_tiles)


def tile_tokens(x: torch.Tensor, slot_of_token: torch.Tensor, num_tiles: int, tile_volume: int) -> torch.Tensor:
    """Put raster tokens into their tiles.

    Args:
        x: `[B, S, H, D]`, any strides; not modified.
        slot_of_token: Slot by raster position, int64 `[S]`.
        num_tiles: N.
        tile_volume: Slots of a tile, M.

    Returns:
        `[B, H, N, M, D]` in the dtype of `x`; padding is zero.
    """
    slots = x.new_zeros(x.shape[0], num_tiles * tile_volume, x.shape[2], x.shape[3])
    slots = slots.index_copy(1, slot_of_token, x)
    return slots.view(x.shape[0], num_tiles, tile_volume, x.shape[2], x.shape[3]).permute(0, 3, 1, 2, 4)


def untile_tokens(tiles: torch.Tensor, slot_of_token: torch.Tensor) -> torch.Tensor:
    """Take tokens out of their tiles, the inverse of `tile_tokens`: `[B, H, N, M, D]` to raster `[B, S, H, D]`."""
    return tiles.permute(0, 2, 3, 1, 4).flatten(1, 2).index_select(1, slot_of_token)


def _tile_of_token(dit_seq_shape: Triple, tile_size: Triple) -> torch.Tensor:
    """Return the tile of every raster position, int64 `[S]` on the CPU."""
    _, tiles_h, tiles_w = count_tiles(dit_seq_shape, tile_size)
    t, h, w = (torch.arange(size) // tile for size, tile in zip(dit_seq_shape, tile_size, strict=True))
    return ((t[:, None, None] * tiles_h + h[:, None]) * tiles_w + w).flatten()


def _triple(name: str, value: Triple) -> Triple:
    """Return the three integers >= 1 as a tuple, or raise with the argument's name."""
    sizes = tuple(value)
    if len(sizes) != 3 or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise UnsupportedRequestError(f"{name} must be three integers >= 1 along T, H and W, got {value!r}")
    return sizes
