"""The pairs (query, chosen chunk) of every head, sorted by chunk: a stable counting sort without atomics.

count   chosen chunks of every block of queries
scan    of the counts over the blocks: how many queries before a block chose a chunk; where the rows of a chunk start
place   the row of every pair
lists   for every tile of rows the key blocks of its chunk; for the backward pass also the transpose

Rows of a chunk start at a multiple of TILE. With k chunks per query a head has at most S * k + C * TILE rows, whatever is
chosen, so nothing waits for the device.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE = 128
QUERIES = 64


@dataclass(frozen=True)
class SortedPairs:
    """Where every pair goes.

    rows: int32 [B, H, k, S], tokens in chunk order: the rows of a query, by rising chunk. sizes: int32 [B, H, C], queries of
    every chunk. tiles: tiles of TILE rows that every head has room for.
    """

    rows: torch.Tensor
    sizes: torch.Tensor
    tiles: int


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


@triton.jit(do_not_specialize=["n_blocks", "n_cols", "n_chunks"])
def _vmoba_scan_kernel(
    count_ptr, size_ptr, start_ptr, n_blocks, n_cols, n_chunks, BLOCKS: tl.constexpr, COLS: tl.constexpr, TILE: tl.constexpr,
):
    bh = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    is_col = cols < n_cols
    total = tl.zeros([COLS], tl.int32)
    for first in range(0, n_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = count_ptr + ((bh * n_blocks + block) * n_cols)[:, None] + cols[None, :]
        mask = (block < n_blocks)[:, None] & is_col[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tiles = (total + TILE - 1) // TILE
    tl.store(size_ptr + bh * n_chunks + cols, total, mask=cols < n_chunks)
    tl.store(start_ptr + bh * n_cols + cols, (tl.cumsum(tiles, 0) - tiles) * TILE, mask=is_col)


@triton.jit(do_not_specialize=["n_words", "n_blocks", "n_slots", "length"])
def _vmoba_place_kernel(
    word_ptr, count_ptr, start_ptr, row_ptr, n_words, n_blocks, n_slots, length, QUERIES: tl.constexpr,
):
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    token = block * QUERIES + tl.arange(0, QUERIES)
    is_token = token < length
    slot = tl.zeros([QUERIES], tl.int32)
    for word in range(n_words):
        members = _members(word_ptr + (bh * n_words + word) * length, token, is_token)
        cols = word * 32 + tl.arange(0, 32)
        before = tl.load(count_ptr + (bh * n_blocks + block) * n_words * 32 + cols)
        start = tl.load(start_ptr + bh * n_words * 32 + cols)
        rows = (start + before)[None, :] + tl.cumsum(members, 0) - members
        slots = slot[:, None] + tl.cumsum(members, 1) - members
        at = row_ptr + (bh * n_slots + slots) * length + token[:, None]
        tl.store(at, rows, mask=(members > 0) & (slots < n_slots))
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


def sort_pairs(words, chunks, topk: int) -> SortedPairs:
    """Sort the pairs of a choice of `topk` chunks for every query; `words` as `select` makes them."""
    B, heads, n_words, S = words.shape
    n_blocks, cols = triton.cdiv(S, QUERIES), n_words * 32
    counts = torch.empty(B, heads, n_blocks, cols, device=words.device, dtype=torch.int32)
    sizes = torch.empty(B, heads, chunks.num_chunks, device=words.device, dtype=torch.int32)
    starts = torch.empty(B, heads, cols, device=words.device, dtype=torch.int32)
    rows = torch.empty(B, heads, topk, S, device=words.device, dtype=torch.int32)
    _vmoba_count_kernel[(n_blocks, n_words, B * heads)](words, counts, n_words, n_blocks, S, QUERIES=QUERIES, num_warps=4)
    padded = triton.next_power_of_2(cols)
    _vmoba_scan_kernel[(B * heads,)](
        counts, sizes, starts, n_blocks, cols, chunks.num_chunks,
        BLOCKS=max(1, min(32, 4096 // padded)), COLS=padded, TILE=TILE, num_warps=4)
    _vmoba_place_kernel[(n_blocks, B * heads)](
        words, counts, starts, rows, n_words, n_blocks, topk, S, QUERIES=QUERIES, num_warps=4)
    return SortedPairs(rows, sizes, S * topk // TILE + chunks.num_chunks)


def tile_lists(pairs: SortedPairs, chunk_blocks: int, last_blocks: int):
    """Key blocks of every tile: lists int32 [B, H, tiles, chunk_blocks] and counts int32 [B, H, tiles]."""
    B, heads, C = pairs.sizes.shape
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
    B, heads, C = pairs.sizes.shape
    n_blocks = (C - 1) * chunk_blocks + last_blocks
    offsets = torch.empty(B, heads, n_blocks + 1, device=pairs.sizes.device, dtype=torch.int32)
    entries = torch.empty(B, heads, pairs.tiles * chunk_blocks, device=pairs.sizes.device, dtype=torch.int32)
    order = torch.empty(B, heads, n_blocks, device=pairs.sizes.device, dtype=torch.int32)
    _vmoba_transpose_kernel[(C * chunk_blocks, B * heads)](
        pairs.sizes, offsets, entries, order, pairs.tiles, C, chunk_blocks, last_blocks, chunk_blocks,
        COLS=max(16, triton.next_power_of_2(C)), TILE=TILE, num_warps=1)
    return offsets, entries, order
