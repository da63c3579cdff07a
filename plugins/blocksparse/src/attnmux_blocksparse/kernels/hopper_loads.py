"""What the Hopper kernels share: walking a list of blocks and fetching them through TMA."""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attnmux_blocksparse.kernels.arguments import RasterTiles, tma_strides

# The consumers' registers; the launch gives every thread 168, and the producers give theirs up.
CONSUMER_REGISTERS = 240


@gluon.jit
def place_of(tile, n_tiles_head, n_heads):
    """Batch, head and position within the head of a tile."""
    bh = tile // n_tiles_head
    return bh // n_heads, bh % n_heads, tile % n_tiles_head


@gluon.jit
def sub_block(blocks, j, n_sub, BLOCK_K: gl.constexpr):
    """Block number and first key of the j-th sub-block of 64 keys (clamped into the list; key 0 for an empty list)."""
    SUB: gl.constexpr = BLOCK_K // 64
    at = gl.minimum(gl.maximum(j, 0), gl.maximum(n_sub - 1, 0))
    block = gl.load(blocks + at // SUB)
    if n_sub == 0:
        block = block * 0
    return block, block * BLOCK_K + (at % SUB) * 64


@gluon.jit
def place_in_raster(desc, batch, row, length, BLOCK: gl.constexpr):
    """Frame, line and column where the box of row `row` begins, in a descriptor of tiles (see `describe`)."""
    lines: gl.constexpr = desc.block_shape[1]
    columns: gl.constexpr = desc.block_shape[2]
    tiles_h = desc.shape[1] // lines
    tiles_w = desc.shape[2] // columns
    tile = row // BLOCK
    frame = tile // (tiles_h * tiles_w) * (BLOCK // (lines * columns)) + row % BLOCK // (lines * columns)
    frames = length // (desc.shape[1] * desc.shape[2])
    return batch * frames + frame, tile // tiles_w % tiles_h * lines, tile % tiles_w * columns


@gluon.jit
def load_box(desc, bar, buf, i, batch, head, row, column, length, BLOCK: gl.constexpr, ROWS: gl.constexpr = 64):
    """Start to copy a TMA box of ROWS rows of one head into box i of a buffer; length = the rows of a batch entry."""
    boxes = buf._reinterpret(desc.dtype, [buf.shape[0] * 64 // ROWS] + desc.block_shape, desc.layout)  # noqa: RUF005
    if len(desc.block_shape) == 5:
        frame, line, place = place_in_raster(desc, batch, row, length, BLOCK)
        tma.async_copy_global_to_shared(desc, [frame, line, place, head, column], bar, boxes.index(i))
    else:
        tma.async_copy_global_to_shared(desc, [batch, head, row, column], bar, boxes.index(i))


@gluon.jit
def load_stage(desc, bar, buf, base, batch, head, key_a, key_b, length, BLOCK_K: gl.constexpr, PAIR: gl.constexpr,
               PANELS: gl.constexpr):
    """Fill one ring stage: PANELS column panels (64 wide) of PAIR sub-blocks, as TMA boxes of 8 KB."""
    mbarrier.expect(bar, PAIR * PANELS * 64 * 64 * 2)
    for p in gl.static_range(PANELS):
        load_box(desc, bar, buf, base + p * PAIR, batch, head, key_a, p * 64, length, BLOCK_K)
        if PAIR == 2:
            load_box(desc, bar, buf, base + p * PAIR + 1, batch, head, key_b, p * 64, length, BLOCK_K)


@gluon.jit
def load_stage_whole(desc, bar, buf, base, batch, head, key, length, BLOCK_K: gl.constexpr, PANELS: gl.constexpr):
    """Fill one ring stage of 128 keys that follow one another, as TMA boxes of 16 KB."""
    mbarrier.expect(bar, PANELS * 128 * 64 * 2)
    for p in gl.static_range(PANELS):
        load_box(desc, bar, buf, base // 2 + p, batch, head, key, p * 64, length, BLOCK_K, 128)


@gluon.jit
def clear_padding(buf, base, valid_a, valid_b, DTYPE: gl.constexpr, PAIR: gl.constexpr, PANELS: gl.constexpr):
    """Zero the rows of a stage beyond its valid keys: a weight of 0 times a NaN would be NaN.

    Both consumers may do it to one stage at once: they write the same values.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(PANELS * PAIR):
        valid = valid_a
        if i % PAIR == 1:
            valid = valid_b
        panel = buf.index(base + i)._reinterpret(DTYPE, [64, 64], SHARED)
        x = panel.load(LAYOUT)
        panel.store(gl.where((rows < valid)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def valid_keys(blocks, j, n, end_last, k_len_ptr, len_k, BLOCK_K: gl.constexpr, HAS_K_LEN: gl.constexpr):
    """How many of the 64 keys of the j-th sub-block may be attended to; j below 0 counts as 0.

    Without valid lengths only the last listed block can reach beyond the sequence: end_last, its number of tokens within it,
    says all, and nothing is loaded.
    """
    SUB: gl.constexpr = BLOCK_K // 64
    if HAS_K_LEN:
        block, key = sub_block(blocks, j, n, BLOCK_K)
        end = gl.minimum(block * BLOCK_K + gl.load(k_len_ptr + block), gl.minimum((block + 1) * BLOCK_K, len_k))
        return gl.minimum(gl.maximum(end - key, 0), 64)
    else:
        at = gl.maximum(j, 0) - (n - SUB)
        return gl.where(at < 0, 64, gl.minimum(gl.maximum(end_last - at * 64, 0), 64))


@gluon.jit
def last_block_tokens(blocks, n, len_k, BLOCK_K: gl.constexpr):
    """Tokens of the sequence from the start of the last listed block on."""
    block, _ = sub_block(blocks, n - 1, n, BLOCK_K)
    return len_k - block * BLOCK_K


# Making one takes as long as all else of a descriptor.
_FLAT_BOX, _RASTER_BOX = (gl.NVMMASharedLayout(128, 16, rank) for rank in (4, 5))


def describe(x: torch.Tensor, rows: int, columns: int, raster: RasterTiles | None = None) -> TensorDescriptor:
    """TMA descriptor of x [B, S, H, D] with boxes of rows x columns.

    It is seen as [B, H, S, D]; where blocks are tiles of a raster as [B * T, H, W, heads, D], with boxes that are part of a tile.
    """
    if raster is not None:
        return TensorDescriptor(x, *raster.view(x), raster.box(rows, columns), _RASTER_BOX)
    shape = [x.shape[0], x.shape[2], x.shape[1], x.shape[3]]
    return TensorDescriptor(x, shape, tma_strides(x), [1, 1, rows, columns], _FLAT_BOX)
