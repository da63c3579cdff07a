"""The pairs (query, chosen chunk) of every unit, sorted by chunk: a stable counting sort without atomics.

count   chosen chunks of every range of 128 queries
scan    of the counts over the ranges: how many queries before a range chose a chunk; which ranges are walked
place   where the rows of a chunk start; the row of every pair, and the query of every row; the chunks of every walked range
lists   for every tile of rows the key blocks of its chunk; for the backward pass also the transpose
tiles   for every tile of rows its chunk, for kernels that read by index
rank    the chunks by falling number of queries

A range whose queries agree is walked instead of sorted: a program owns its queries and walks the union of the chunks that they
chose, with a mask over the rows (`attend`). The union must cost no more than `most_waste` times the pairs of the range. Gradients
of keys are added up by chunk all the same: for them the queries of walked ranges follow those of the tiles of a chunk in `order`.

A unit is a number of ranges of one head: all of them, or fewer, so that the rows of a unit stay small. Rows of a chunk start at a
multiple of TILE. With k chunks per query a unit has at most its queries * k + C * TILE rows, whatever is chosen, so nothing waits
for the device. Where queries keep different numbers of chunks, units have room for a part of all pairs, and all ranges from the
first one on that finds no room are walked, and are nowhere in `order`.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attnmux_vmoba.kernels.geometry import GEOMETRY, geometry_arguments, raster_of

# rows of a tile, and queries of a range
TILE = 128


@dataclass(frozen=True)
class SortedPairs:
    """Where every pair goes.

    Attributes:
        firsts: int32 [B, H, U, n + 1]: the pairs of token i of a unit are firsts[i] .. firsts[i + 1] of `rows`. Tokens are in chunk
            order; unit u of U has tokens u * n .. (u + 1) * n of the head. Tokens of a walked range have none.
        rows: int32 [B, H, U, capacity]: rows of the pairs, token by token, by rising chunk.
        order: int32 [B, H, U, TILE * tiles]: raster position of the query of a row; what is between chunks is undefined.
        starts: int32 [B, H, U, C]: first row of every chunk.
        sizes: int32 [2, B, H, U, C]: rows of every chunk, of tiles alone and with those of walked ranges.
        placed: int32 [B, H, U]: tokens of a unit up to the first range without room.
        walks: int32 [B, H, R]: chunks that a range walks, 0 where it is sorted. Range r has tokens r * TILE .. (r + 1) * TILE.
        walked: int32 [B, H, R, C]: the chunks of a walked range, rising; undefined from its number on.
        raster: int32 [S]: raster position of every token.
        tiles: tiles of TILE rows that every unit has room for.
    """

    firsts: torch.Tensor
    rows: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    sizes: torch.Tensor
    placed: torch.Tensor
    walks: torch.Tensor
    walked: torch.Tensor
    raster: torch.Tensor
    tiles: int

    @property
    def units(self) -> int:
        """Units of all samples and heads."""
        return self.placed.numel()

    @property
    def per_head(self) -> int:
        """Units of a head, U."""
        return self.placed.shape[2]

    @property
    def unit_tokens(self) -> int:
        """Queries of a unit, n, a multiple of TILE."""
        return self.firsts.shape[3] - 1


@triton.jit
def _members(word_ptr, token, is_token):
    """Which of 32 chunks the tokens chose: int32 0 or 1, [TILE, 32]."""
    words = tl.load(word_ptr + token, mask=is_token, other=0)
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit(do_not_specialize=["n_words", "length"])
def _vmoba_count_kernel(word_ptr, count_ptr, pair_ptr, union_ptr, n_words, length, TILE: tl.constexpr):
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    word_ptr += tl.program_id(1).to(tl.int64) * n_words * length
    n_pairs = 0
    n_union = 0
    for word in range(n_words):
        counts = tl.sum(_members(word_ptr + word * length.to(tl.int64), token, token < length), 0)
        tl.store(count_ptr + (at * n_words + word) * 32 + tl.arange(0, 32), counts)
        n_pairs += tl.sum(counts, 0)
        n_union += tl.sum((counts > 0).to(tl.int32), 0)
    tl.store(pair_ptr + at, n_pairs)
    tl.store(union_ptr + at, n_union)


@triton.jit(do_not_specialize=["n_ranges", "n_words", "n_chunks", "capacity", "most_waste"])
def _vmoba_scan_kernel(
    count_ptr, pair_ptr, union_ptr, begin_ptr, walk_ptr, size_ptr, all_size_ptr, placed_ptr,
    n_ranges, n_words, n_chunks, capacity, most_waste, ORDERS_WALKED: tl.constexpr, RANGES: tl.constexpr, TILE: tl.constexpr,
):
    """A program counts for 32 chunks of a unit; what is one for all chunks, every program finds, and the first one writes."""
    unit = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    # rows of tiles, and of walked ranges
    total = tl.zeros([32], tl.int32)
    total_walked = tl.zeros([32], tl.int32)
    n_before = 0
    n_tiled = 0
    n_placed = 0
    for first in range(0, n_ranges, RANGES):
        local = first + tl.arange(0, RANGES)
        is_range = local < n_ranges
        place = unit * n_ranges + local
        at = count_ptr + ((place * n_words + word) * 32)[:, None] + tl.arange(0, 32)[None, :]
        counts = tl.load(at, mask=is_range[:, None], other=0)
        n_pairs = tl.load(pair_ptr + place, mask=is_range, other=0)
        n_union = tl.load(union_ptr + place, mask=is_range, other=0)
        agrees = (n_union > 0) & (n_union * TILE <= most_waste * n_pairs)
        n_ordered = n_pairs
        if not ORDERS_WALKED:
            n_ordered = tl.where(agrees, 0, n_pairs)
        has_room = n_before + tl.cumsum(n_ordered, 0) <= capacity
        n_before += tl.sum(n_ordered, 0)
        is_tiled = has_room & (agrees == 0)
        if word == 0:
            n_placed += tl.sum((is_range & has_room).to(tl.int32), 0)
            n_pairs = tl.where(is_tiled, n_pairs, 0)
            tl.store(begin_ptr + place, n_tiled + tl.cumsum(n_pairs, 0) - n_pairs, mask=is_range)
            n_tiled += tl.sum(n_pairs, 0)
            tl.store(walk_ptr + place, tl.where(is_tiled, 0, n_union), mask=is_range)
        tiled = tl.where(is_tiled[:, None], counts, 0)
        walked = tl.where((has_room & agrees)[:, None], counts, 0)
        before = tl.where(
            is_tiled[:, None], total[None, :] + tl.cumsum(tiled, 0) - tiled, total_walked[None, :] + tl.cumsum(walked, 0) - walked)
        tl.store(at, before, mask=is_range[:, None])
        total += tl.sum(tiled, 0)
        total_walked += tl.sum(walked, 0)
    if word == 0:
        tl.store(placed_ptr + unit, n_placed * TILE)
    if ORDERS_WALKED:
        total_walked += total
    else:
        total_walked = total
    cols = word * 32 + tl.arange(0, 32)
    tl.store(size_ptr + unit * n_chunks + cols, total, mask=cols < n_chunks)
    tl.store(all_size_ptr + unit * n_chunks + cols, total_walked, mask=cols < n_chunks)


@triton.jit(do_not_specialize=["n_words", "n_units", "n_chunks", "n_rows", "capacity", *GEOMETRY])
def _vmoba_place_kernel(
    word_ptr, count_ptr, walk_ptr, begin_ptr, size_ptr, all_size_ptr, placed_ptr,
    start_ptr, first_ptr, row_ptr, order_ptr, walked_ptr, raster_ptr, n_words, n_units, n_chunks, n_rows, capacity,
    n_h, n_w, box_t, box_h, box_w, grid_h, grid_w, chunk_tokens, length, ORDERS_WALKED: tl.constexpr, TILE: tl.constexpr,
):
    r = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    place = bh * tl.num_programs(0) + r
    token = r * TILE + tl.arange(0, TILE)
    raster = raster_of(token // chunk_tokens, token % chunk_tokens, n_h, n_w, box_t, box_h, box_w, grid_h, grid_w)
    if bh == 0:
        tl.store(raster_ptr + token, raster, mask=token < length)
    unit_ranges = tl.num_programs(0) // n_units
    unit = bh * n_units + r // unit_ranges
    local = r % unit_ranges * TILE
    is_walked = tl.load(walk_ptr + place) > 0
    is_tiled = token < tl.where(is_walked, 0, length)
    number = tl.zeros([TILE], tl.int32)
    for word in range(n_words):
        number += tl.sum(_members(word_ptr + (bh * n_words + word) * length, token, is_tiled), 1)
    slot = tl.load(begin_ptr + place) + tl.cumsum(number, 0)
    at = unit * (unit_ranges * TILE + 1) + local + tl.arange(0, TILE)
    tl.store(first_ptr + at + 1, slot)
    slot -= number
    if local == 0:
        tl.store(first_ptr + unit * (unit_ranges * TILE + 1), 0)
    count_ptr += place * n_words * 32
    row_ptr += unit * capacity
    order_ptr += unit * n_rows
    walked_ptr += place * n_chunks
    n_walks = 0
    n_before = 0
    # a range without room is nowhere in the order
    has_rows = local < tl.load(placed_ptr + unit)
    if not ORDERS_WALKED:
        has_rows = has_rows & (is_walked == 0)
    for word in range(n_words):
        members = _members(word_ptr + (bh * n_words + word) * length, token, token < length)
        cols = word * 32 + tl.arange(0, 32)
        is_chunk = cols < n_chunks
        n_tiles = (tl.load(all_size_ptr + unit * n_chunks + cols, mask=is_chunk, other=0) + TILE - 1) // TILE
        start = (n_before + tl.cumsum(n_tiles, 0) - n_tiles) * TILE
        n_before += tl.sum(n_tiles, 0)
        if local == 0:
            tl.store(start_ptr + unit * n_chunks + cols, start, mask=is_chunk)
        start += tl.load(count_ptr + cols)
        if is_walked:
            start += tl.load(size_ptr + unit * n_chunks + cols, mask=is_chunk, other=0)
            in_union = (tl.sum(members, 0) > 0).to(tl.int32)
            tl.store(walked_ptr + n_walks + tl.cumsum(in_union, 0) - in_union, cols, mask=in_union > 0)
            n_walks += tl.sum(in_union, 0)
        if has_rows:
            rows = start[None, :] + tl.cumsum(members, 0) - members
            tl.store(order_ptr + rows, tl.broadcast_to(raster[:, None], [TILE, 32]), mask=members > 0)
            slots = slot[:, None] + tl.cumsum(members, 1) - members
            tl.store(row_ptr + slots, rows, mask=(members > 0) & is_tiled[:, None])
            slot += tl.sum(members, 1)


@triton.jit(do_not_specialize=["n_tiles", "n_chunks", "chunk_blocks", "last_blocks", "width"])
def _vmoba_lists_kernel(
    size_ptr, list_ptr, count_ptr, n_tiles, n_chunks, chunk_blocks, last_blocks, width,
    TILES: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
):
    bh = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, COLS)
    sizes = tl.load(size_ptr + bh * n_chunks + cols, mask=cols < n_chunks, other=0)
    ends = tl.cumsum((sizes + TILE - 1) // TILE, 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    chunk = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    blocks = tl.where(chunk == n_chunks - 1, last_blocks, chunk_blocks)
    # tiles after the last one have counted past every column
    blocks = tl.where(chunk < n_chunks, blocks, 0)
    tl.store(count_ptr + bh * n_tiles + tile, blocks, mask=tile < n_tiles)
    first = tl.where(chunk < n_chunks, chunk, 0) * chunk_blocks
    for i in range(width):
        tl.store(list_ptr + (bh * n_tiles + tile) * width + i, first + i, mask=tile < n_tiles)


@triton.jit(do_not_specialize=["n_tiles", "n_chunks", "chunk_blocks", "last_blocks", "width"])
def _vmoba_transpose_kernel(
    size_ptr, offset_ptr, entry_ptr, order_ptr, n_tiles, n_chunks, chunk_blocks, last_blocks, width,
    COLS: tl.constexpr, TILE: tl.constexpr,
):
    """Tiles of every key block, as compressed rows; the key blocks of the longest lists come first in the order."""
    chunk = tl.program_id(0) // width
    local = tl.program_id(0) % width
    bh = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, COLS)
    is_chunk = cols < n_chunks
    sizes = tl.load(size_ptr + bh * n_chunks + cols, mask=is_chunk, other=0)
    tiles = (sizes + TILE - 1) // TILE
    blocks = tl.where(cols == n_chunks - 1, last_blocks, chunk_blocks)
    blocks = tl.where(is_chunk, blocks, 0)
    mine = tl.sum(tl.where(cols == chunk, tiles, 0), 0)
    is_before = cols < chunk
    first_tile = tl.sum(tl.where(is_before, tiles, 0), 0)
    offset = tl.sum(tl.where(is_before, tiles * blocks, 0), 0) + local * mine
    is_longer = is_chunk & ((tiles > mine) | ((tiles == mine) & is_before))
    n_blocks = (n_chunks - 1) * chunk_blocks + last_blocks
    block = chunk * chunk_blocks + local
    if local < tl.where(chunk == n_chunks - 1, last_blocks, chunk_blocks):
        tl.store(order_ptr + bh * n_blocks + tl.sum(tl.where(is_longer, blocks, 0), 0) + local, block)
        tl.store(offset_ptr + bh * (n_blocks + 1) + block, offset)
        if block == n_blocks - 1:
            tl.store(offset_ptr + bh * (n_blocks + 1) + n_blocks, offset + mine)
        for i in range(0, mine, COLS):
            at = i + cols
            tl.store(entry_ptr + bh * n_tiles * width + offset + at, first_tile + at, mask=at < mine)


@triton.jit(do_not_specialize=["n_tiles", "n_chunks"])
def _vmoba_tiles_kernel(
    start_ptr, size_ptr, tile_ptr, used_ptr, n_tiles, n_chunks, TILES: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
):
    unit = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, COLS)
    starts = tl.load(start_ptr + unit * n_chunks + cols, mask=cols < n_chunks, other=0x7FFFFFFF)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    # of chunks without queries, which start where the next one does, none is the last of those that started
    chunk = tl.sum((starts[None, :] <= (tile * TILE)[:, None]).to(tl.int32), 1) - 1
    at = unit * n_chunks + chunk
    end = tl.load(start_ptr + at) + tl.load(size_ptr + at)
    rows = tl.minimum(tl.maximum(end - tile * TILE, 0), TILE)
    is_tile = tile < n_tiles
    tl.store(tile_ptr + (unit * n_tiles + tile) * 2, chunk, mask=is_tile)
    tl.store(tile_ptr + (unit * n_tiles + tile) * 2 + 1, rows, mask=is_tile)
    if tl.program_id(0) == 0:
        sizes = tl.load(size_ptr + unit * n_chunks + cols, mask=cols < n_chunks, other=0)
        tl.store(used_ptr + unit, tl.max(tl.where(sizes > 0, (starts + sizes + TILE - 1) // TILE, 0), 0))


@triton.jit(do_not_specialize=["n_chunks"])
def _vmoba_rank_kernel(size_ptr, rank_ptr, n_chunks, n_units, COLS: tl.constexpr):
    """Chunks of a head in the order of their queries, over all units; the first of equals first."""
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, COLS)
    sizes = tl.zeros([COLS], tl.int32)
    for unit in range(n_units):
        sizes += tl.load(size_ptr + (bh * n_units + unit) * n_chunks + cols, mask=cols < n_chunks, other=0)
    mine = tl.sum(tl.where(cols == chunk, sizes, 0), 0)
    is_before = (cols < n_chunks) & ((sizes > mine) | ((sizes == mine) & (cols < chunk)))
    tl.store(rank_ptr + bh * n_chunks + tl.sum(is_before.to(tl.int32), 0), chunk)


def sort_pairs(words, chunks, kept: int, units: int = 1, most_waste: float = 0.0, *, orders_walked: bool = False) -> SortedPairs:
    """Sort the pairs of a choice.

    Args:
        words: as `select` makes them.
        chunks: the chunks.
        kept: chunks that every query keeps, or the mean number for which units have room.
        units: units of a head.
        most_waste: how many times the rows of its pairs a range may take to be walked; 0 walks none that has room.
        orders_walked: put the queries of walked ranges in the order, too; they need room then.
    """
    B, heads, n_words, S = words.shape
    C = chunks.num_chunks
    unit_ranges = triton.cdiv(triton.cdiv(S, TILE), units)
    ranges, tokens = unit_ranges * units, unit_ranges * TILE
    # a unit may have tokens beyond the sequence, which choose nothing
    capacity = min(tokens, S) * kept
    tiles = capacity // TILE + C

    def table(*shape):
        return torch.empty(shape, device=words.device, dtype=torch.int32)

    counts, per_range = table(B, heads, ranges, n_words * 32), table(3, B, heads, ranges)
    numbers, unions, begins = per_range.unbind(0)
    pairs = SortedPairs(
        table(B, heads, units, tokens + 1), table(B, heads, units, capacity), table(B, heads, units, tiles * TILE),
        table(B, heads, units, C), table(2, B, heads, units, C), table(B, heads, units), table(B, heads, ranges),
        table(B, heads, ranges, C), table(S), tiles)
    _vmoba_count_kernel[(ranges, B * heads)](words, counts, numbers, unions, n_words, S, TILE=TILE, num_warps=4)
    _vmoba_scan_kernel[(B * heads * units, n_words)](
        counts, numbers, unions, begins, pairs.walks, *pairs.sizes.unbind(0), pairs.placed,
        unit_ranges, n_words, C, capacity, float(most_waste), ORDERS_WALKED=orders_walked, RANGES=128, TILE=TILE, num_warps=8)
    _vmoba_place_kernel[(ranges, B * heads)](
        words, counts, pairs.walks, begins, *pairs.sizes.unbind(0), pairs.placed,
        pairs.starts, pairs.firsts, pairs.rows, pairs.order, pairs.walked, pairs.raster,
        n_words, units, C, tiles * TILE, capacity, *geometry_arguments(chunks),
        ORDERS_WALKED=orders_walked, TILE=TILE, num_warps=8)
    return pairs


def describe_tiles(pairs: SortedPairs):
    """Chunk and number of rows of every tile, int32 [B, H, U, tiles, 2], and tiles up to the last with rows, int32 [B, H, U]."""
    B, heads, units, C = pairs.starts.shape
    table = torch.empty(B, heads, units, pairs.tiles, 2, device=pairs.starts.device, dtype=torch.int32)
    used = torch.empty_like(pairs.placed)
    cols = max(16, triton.next_power_of_2(C))
    tiles = max(1, min(64, 4096 // cols))
    _vmoba_tiles_kernel[(triton.cdiv(pairs.tiles, tiles), pairs.units)](
        pairs.starts, pairs.sizes[0], table, used, pairs.tiles, C, TILES=tiles, COLS=cols, TILE=TILE, num_warps=4)
    return table, used


def rank_chunks(pairs: SortedPairs):
    """Chunks of every head by falling number of ordered queries, int32 [B, H, C]."""
    B, heads, units, C = pairs.starts.shape
    ranks = torch.empty(B, heads, C, device=pairs.starts.device, dtype=torch.int32)
    _vmoba_rank_kernel[(C, B * heads)](
        pairs.sizes[1], ranks, C, units, COLS=max(16, triton.next_power_of_2(C)), num_warps=1)
    return ranks


def tile_lists(pairs: SortedPairs, chunk_blocks: int, last_blocks: int):
    """Key blocks of every tile: lists int32 [B, H, tiles, chunk_blocks] and counts int32 [B, H, tiles]."""
    B, heads, _, C = pairs.starts.shape
    lists = torch.empty(B, heads, pairs.tiles, chunk_blocks, device=pairs.starts.device, dtype=torch.int32)
    counts = torch.empty(B, heads, pairs.tiles, device=pairs.starts.device, dtype=torch.int32)
    cols = max(16, triton.next_power_of_2(C))
    tiles = max(1, min(64, 4096 // cols))
    _vmoba_lists_kernel[(triton.cdiv(pairs.tiles, tiles), B * heads)](
        pairs.sizes[0], lists, counts, pairs.tiles, C, chunk_blocks, last_blocks, chunk_blocks,
        TILES=tiles, COLS=cols, TILE=TILE, num_warps=4)
    return lists, counts


def transposed_lists(pairs: SortedPairs, chunk_blocks: int, last_blocks: int):
    """The transpose of `tile_lists`: offsets, entries and order, as `TransposedLists` documents them."""
    B, heads, _, C = pairs.starts.shape
    n_blocks = (C - 1) * chunk_blocks + last_blocks
    offsets = torch.empty(B, heads, n_blocks + 1, device=pairs.starts.device, dtype=torch.int32)
    entries = torch.empty(B, heads, pairs.tiles * chunk_blocks, device=pairs.starts.device, dtype=torch.int32)
    order = torch.empty(B, heads, n_blocks, device=pairs.starts.device, dtype=torch.int32)
    _vmoba_transpose_kernel[(C * chunk_blocks, B * heads)](
        pairs.sizes[0], offsets, entries, order, pairs.tiles, C, chunk_blocks, last_blocks, chunk_blocks,
        COLS=max(16, triton.next_power_of_2(C)), TILE=TILE, num_warps=1)
    return offsets, entries, order
