"""Where a token in chunk order lies in raster order, for kernels."""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import triton
import triton.language as tl

GEOMETRY = ["n_h", "n_w", "box_t", "box_h", "box_w", "grid_h", "grid_w", "chunk_tokens", "length"]
"""What `raster_of` and its callers take, in the order of `geometry_arguments`. None is specialised on: another video runs the
same code."""


def geometry_arguments(chunks):
    """The numbers of a `ChunkGrid` that kernels take."""
    _, n_h, n_w = chunks.chunks_along
    return (n_h, n_w, *chunks.box, chunks.grid[1], chunks.grid[2], chunks.chunk_tokens, chunks.length)


@triton.jit
def raster_of(chunk, place, n_h, n_w, box_t, box_h, box_w, grid_h, grid_w):
    """Raster position of the place-th token of a chunk."""
    t = chunk // (n_h * n_w) * box_t + place // (box_h * box_w)
    h = chunk // n_w % n_h * box_h + place // box_w % box_h
    w = chunk % n_w * box_w + place % box_w
    return (t * grid_h + h) * grid_w + w


@triton.jit
def offsets_of(rows, stride_s, WIDE: tl.constexpr):
    """Element offsets of rows. A loop over rows spends an eighth of its instructions on products of 64 bits."""
    return rows.to(tl.int64) * stride_s if WIDE else rows * stride_s


def is_wide(*tensors) -> bool:
    """Whether an offset within a sample and head of one of the tensors `[B, S, H, D]` takes 64 bits."""
    return any(x.shape[1] * x.stride(1) >= 2**31 for x in tensors)


@triton.jit
def load_rows(ptr, rows, mask, stride_s, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr = True):
    """Rows of one head as [ROWS, D_PAD]; zeros where the mask is off and beyond D."""
    offs_d = tl.arange(0, D_PAD)
    keep = mask[:, None]
    if D_PAD != D:
        keep = keep & (offs_d < D)[None, :]
    return tl.load(ptr + offsets_of(rows, stride_s, WIDE)[:, None] + offs_d[None, :], mask=keep, other=0.0)


@triton.jit
def store_rows(ptr, x, rows, mask, stride_s, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write rows of one head, in the element type of ptr."""
    offs_d = tl.arange(0, D_PAD)
    keep = mask[:, None]
    if D_PAD != D:
        keep = keep & (offs_d < D)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride_s + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=keep)
