"""The pairs (query, chosen chunk) of every unit, sorted by chunk: a stable counting sort without atomics.

count   chosen chunks of every block of queries
scan    of the counts over the blocks: how many queries before a block chose a chunk; where the rows of a chunk start
place   the row of every pair, and the query of every row
lists   for every tile of rows the key blocks of its chunk; for the backward pass also the transpose
tiles   for every tile of rows its chunk, for kernels that read by index
rank    the chunks by falling number of queries

A unit is a range of the queries of one head: all of them, or fewer, so that the rows of a unit stay small. Rows of a chunk
start at a multiple of TILE. With k chunks per query a unit has at most its queries * k + C * TILE rows, whatever is chosen, so
nothing waits for the device. Where queries keep different numbers of chunks, units have room for a part of all pairs; a unit with
more is marked as crowded and left unsorted, for kernels that walk all chunks of such a unit.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attnmux_vmoba.kernels.geometry import GEOMETRY, geometry_arguments, raster_of

TILE = 128
QUERIES = 64


@dataclass(frozen=True)
class SortedPairs:
    """Where every pair goes.

    Attributes:
        firsts: int32 [B, H, U, R + 1]: the pairs of token i of a unit are firsts[i] .. firsts[i + 1] of `rows`. Tokens are in chunk
            order; unit u of U has tokens u * R .. (u + 1) * R of the head. A crowded unit has no pairs.
        rows: int32 [B, H, U, capacity]: rows of the pairs, token by token, by rising chunk.
        order: int32 [B, H, U, TILE * tiles]: raster position of the query of a row; what is between chunks is undefined.
        starts: int32 [B, H, U, C]: first row of every chunk.
        sizes: int32 [B, H, U, C]: queries of every chunk; 0 in a crowded unit.
        crowded: int32 [B, H, U]: 1 where a unit has more pairs than room.
        raster: int32 [S]: raster position of every token.
        tiles: tiles of TILE rows that every unit has room for.
    """

    firsts: torch.Tensor
    rows: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    sizes: torch.Tensor
    crowded: torch.Tensor
    raster: torch.Tensor
    tiles: int

    @property
    def units(self) -> int:
        """Units of all samples and heads."""
        return self.crowded.numel()

    @property
    def per_head(self) -> int:
        """Units of a head, U."""
        return self.crowded.shape[2]

    @property
    def unit_tokens(self) -> int:
        """Queries of a unit, R."""
        return self.firsts.shape[3] - 1


@triton.jit
def _members(word_ptr, token, is_token):
    """Which of 32 chunks the tokens chose: int32 0 or 1, [QUERIES, 32]."""
    words = tl.load(word_ptr + token, mask=is_token, other=0)
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit(do_not_specialize=["n_words", "n_blocks", "length"])
def _vmoba_count_kernel(word_ptr, count_ptr, n_words, n_blocks, length, QUERIES: tl.constexpr):
    block = tl.program_id(0)
    word = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    token = block * QUERIES + tl.arange(0, QUERIES)
    members = _members(word_ptr + (bh * n_words + word) * length, token, token < length)
    at = ((bh * n_blocks + block) * n_words + word) * 32
    tl.store(count_ptr + at + tl.arange(0, 32), tl.sum(members, 0))


@triton.jit(do_not_specialize=["n_blocks", "n_cols", "n_chunks", "capacity"])
def _vmoba_scan_kernel(
    count_ptr, size_ptr, start_ptr, crowded_ptr, n_blocks, n_cols, n_chunks, capacity,
    BLOCKS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    is_col = cols < n_cols
    total = tl.zeros([COLS], tl.int32)
    for first in range(0, n_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = count_ptr + ((unit * n_blocks + block) * n_cols)[:, None] + cols[None, :]
        mask = (block < n_blocks)[:, None] & is_col[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    is_crowded = tl.sum(total, 0) > capacity
    tl.store(crowded_ptr + unit, is_crowded.to(tl.int32))
    total = tl.where(is_crowded, 0, total)
    tiles = (total + TILE - 1) // TILE
    is_chunk = cols < n_chunks
    tl.store(size_ptr + unit * n_chunks + cols, total, mask=is_chunk)
    tl.store(start_ptr + unit * n_chunks + cols, (tl.cumsum(tiles, 0) - tiles) * TILE, mask=is_chunk)


@triton.jit(do_not_specialize=["n_words", "n_blocks", "n_units", "n_chunks", "n_rows", "capacity", *GEOMETRY])
def _vmoba_place_kernel(
    word_ptr, count_ptr, start_ptr, crowded_ptr, first_ptr, row_ptr, order_ptr, raster_ptr,
    n_words, n_blocks, n_units, n_chunks, n_rows, capacity,
    n_h, n_w, box_t, box_h, box_w, grid_h, grid_w, chunk_tokens, length, QUERIES: tl.constexpr,
):
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    token = block * QUERIES + tl.arange(0, QUERIES)
    is_token = token < length
    raster = raster_of(token // chunk_tokens, token % chunk_tokens, n_h, n_w, box_t, box_h, box_w, grid_h, grid_w)
    if bh == 0:
        tl.store(raster_ptr + token, raster, mask=is_token)
    unit_blocks = n_blocks // n_units
    unit = bh * n_units + block // unit_blocks
    # a crowded unit places nothing
    is_crowded = tl.load(crowded_ptr + unit) != 0
    is_placed = token < tl.where(is_crowded, 0, length)
    number = tl.zeros([QUERIES], tl.int32)
    first = 0
    for word in range(n_words):
        number += tl.sum(_members(word_ptr + (bh * n_words + word) * length, token, is_placed), 1)
        first += tl.sum(tl.load(count_ptr + (bh * n_blocks + block) * n_words * 32 + word * 32 + tl.arange(0, 32)), 0)
    ends = tl.where(is_crowded, 0, first) + tl.cumsum(number, 0)
    at = unit * (unit_blocks * QUERIES + 1) + (block % unit_blocks) * QUERIES + tl.arange(0, QUERIES)
    tl.store(first_ptr + at + 1, ends)
    if block % unit_blocks == 0:
        tl.store(first_ptr + unit * (unit_blocks * QUERIES + 1), 0)
    slot = ends - number
    row_ptr += unit * capacity
    order_ptr += unit * n_rows
    for word in range(n_words):
        members = _members(word_ptr + (bh * n_words + word) * length, token, is_placed)
        cols = word * 32 + tl.arange(0, 32)
        before = tl.load(count_ptr + (bh * n_blocks + block) * n_words * 32 + cols)
        start = tl.load(start_ptr + unit * n_chunks + cols, mask=cols < n_chunks, other=0)
        rows = (start + before)[None, :] + tl.cumsum(members, 0) - members
        slots = slot[:, None] + tl.cumsum(members, 1) - members
        tl.store(row_ptr + slots, rows, mask=members > 0)
        tl.store(order_ptr + rows, tl.broadcast_to(raster[:, None], [QUERIES, 32]), mask=members > 0)
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
    start_ptr, size_ptr, tile_ptr, n_tiles, n_chunks, TILES: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
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


def sort_pairs(words, chunks, kept: int, units: int = 1) -> SortedPairs:
    """Sort the pairs of a choice.

    Args:
        words: as `select` makes them.
        chunks: the chunks.
        kept: chunks that every query keeps, or the mean number for which units have room.
        units: units of a head.
    """
    B, heads, n_words, S = words.shape
    C, cols = chunks.num_chunks, n_words * 32
    unit_blocks = triton.cdiv(triton.cdiv(S, QUERIES), units)
    n_blocks, tokens = unit_blocks * units, unit_blocks * QUERIES
    # a unit may have tokens beyond the sequence, which choose nothing
    capacity = min(tokens, S) * kept
    tiles = capacity // TILE + C

    def table(*shape):
        return torch.empty(shape, device=words.device, dtype=torch.int32)

    counts, sizes, starts = table(B, heads, n_blocks, cols), table(B, heads, units, C), table(B, heads, units, C)
    pairs = SortedPairs(
        table(B, heads, units, tokens + 1), table(B, heads, units, capacity), table(B, heads, units, tiles * TILE),
        starts, sizes, table(B, heads, units), table(S), tiles)
    _vmoba_count_kernel[(n_blocks, n_words, B * heads)](words, counts, n_words, n_blocks, S, QUERIES=QUERIES, num_warps=4)
    padded = triton.next_power_of_2(cols)
    _vmoba_scan_kernel[(B * heads * units,)](
        counts, sizes, starts, pairs.crowded, unit_blocks, cols, C, capacity,
        BLOCKS=max(1, min(32, 4096 // padded)), COLS=padded, TILE=TILE, num_warps=4)
    _vmoba_place_kernel[(n_blocks, B * heads)](
        words, counts, starts, pairs.crowded, pairs.firsts, pairs.rows, pairs.order, pairs.raster,
        n_words, n_blocks, units, C, tiles * TILE, capacity, *geometry_arguments(chunks), QUERIES=QUERIES, num_warps=4)
    return pairs


def describe_tiles(pairs: SortedPairs):
    """Chunk and number of rows of every tile, int32 [B, H, U, tiles, 2]; no rows after the last tile."""
    B, heads, units, C = pairs.sizes.shape
    table = torch.empty(B, heads, units, pairs.tiles, 2, device=pairs.sizes.device, dtype=torch.int32)
    cols = max(16, triton.next_power_of_2(C))
    tiles = max(1, min(64, 4096 // cols))
    _vmoba_tiles_kernel[(triton.cdiv(pairs.tiles, tiles), pairs.units)](
        pairs.starts, pairs.sizes, table, pairs.tiles, C, TILES=tiles, COLS=cols, TILE=TILE, num_warps=4)
    return table


def rank_chunks(pairs: SortedPairs):
    """Chunks of every head by falling number of queries, int32 [B, H, C]."""
    B, heads, units, C = pairs.sizes.shape
    ranks = torch.empty(B, heads, C, device=pairs.sizes.device, dtype=torch.int32)
    _vmoba_rank_kernel[(C, B * heads)](
        pairs.sizes, ranks, C, units, COLS=max(16, triton.next_power_of_2(C)), num_warps=1)
    return ranks


def tile_lists(pairs: SortedPairs, chunk_blocks: int, last_blocks: int):
    """Key blocks of every tile: lists int32 [B, H, tiles, chunk_blocks] and counts int32 [B, H, tiles]."""
    B, heads, _, C = pairs.sizes.shape
    lists = torch.empty(B, heads, pairs.tiles, chunk_blocks, device=pairs.sizes.device, dtype=torch.int32)
    counts = torch.empty(B, heads, pairs.tiles, device=pairs.sizes.device, dtype=torch.int32)
    cols = max(16, triton.next_power_of_2(C))
    tiles = max(1, min(64, 4096 // cols))
    _vmoba_lists_kernel[(triton.cdiv(pairs.tiles, tiles), B * heads)](
        pairs.sizes, lists, counts, pairs.tiles, C, chunk_blocks, last_blocks, chunk_blocks,
        TILES=tiles, COLS=cols, TILE=TILE, num_warps=4)
    return lists, counts


def transposed_lists(pairs: SortedPairs, chunk_blocks: int, last_blocks: int):
    """The transpose of `tile_lists`: offsets, entries and order, as `TransposedLists` documents them."""
    B, heads, _, C = pairs.sizes.shape
    n_blocks = (C - 1) * chunk_blocks + last_blocks
    offsets = torch.empty(B, heads, n_blocks + 1, device=pairs.sizes.device, dtype=torch.int32)
    entries = torch.empty(B, heads, pairs.tiles * chunk_blocks, device=pairs.sizes.device, dtype=torch.int32)
    order = torch.empty(B, heads, n_blocks, device=pairs.sizes.device, dtype=torch.int32)
    _vmoba_transpose_kernel[(C * chunk_blocks, B * heads)](
        pairs.sizes, offsets, entries, order, pairs.tiles, C, chunk_blocks, last_blocks, chunk_blocks,
        COLS=max(16, triton.next_power_of_2(C)), TILE=TILE, num_warps=1)
    return offsets, entries, order
