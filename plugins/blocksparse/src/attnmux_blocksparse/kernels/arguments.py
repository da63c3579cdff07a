"""What the launchers share: index tensors with their strides, and TMA descriptors of [B, S, H, D] tensors."""

from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class RasterTiles:
    """Tokens in raster order (frames, lines, columns) whose blocks are tiles: block n is tile n, its rows the tile's tokens.

    Tiles and the tokens of one are counted in raster order too. The tile divides the grid along every axis.
    """

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]

    def fits_boxes(self) -> bool:
        """Whether 64 rows in a row are whole lines of a tile, so that one TMA box holds them."""
        plane = self.tile[1] * self.tile[2]
        is_divided = not any(size % step for size, step in zip(self.grid, self.tile, strict=True))
        return is_divided and 64 % plane == 0 and self.tile[0] * plane % 64 == 0

    def view(self, x: torch.Tensor) -> tuple[list[int], list[int]]:
        """Shape and strides of x [B, T * H * W, heads, D] as [B * T, H, W, heads, D]."""
        frames, lines, columns = self.grid
        step = x.stride(1)
        shape = [x.shape[0] * frames, lines, columns, x.shape[2], x.shape[3]]
        return shape, [lines * columns * step, columns * step, step, x.shape[3] if x.shape[2] == 1 else x.stride(2), 1]

    def box(self, rows: int, columns: int) -> list[int]:
        """Shape of a box of so many rows of a tile."""
        return [rows // (self.tile[1] * self.tile[2]), self.tile[1], self.tile[2], 1, columns]


@dataclass(frozen=True)
class IndexTensors:
    """The tensors of a `BlockIndex` as the kernels take them.

    blocks: int32 [B or 1, H or 1, N_q, K], last dimension contiguous. counts: int32 [B or 1, H or 1, N_q], likewise.
    block_q, block_k: tokens per block. q_lengths, k_lengths: int32 [B or 1, N], valid tokens of each block, or None.
    finite_padding: tokens beyond a valid length are known to hold finite numbers, so that they may be read.
    even_rows: all counts are known to be about equal.
    offsets: int32 [B or 1, H or 1, N_k + 1], entries: int32 [B or 1, H or 1, N_q * K], order: int32 [B or 1, H or 1, N_k]:
    the transposed lists; backward only.
    raster: how blocks lie in q, k, v, out and their gradients, where they are tiles and not stretches of the sequence; lse,
    lse2 and delta go by blocks in any case. Only for engines and tensors without a `raster_reason`.
    """

    blocks: torch.Tensor
    counts: torch.Tensor
    block_q: int
    block_k: int
    q_lengths: torch.Tensor | None = None
    k_lengths: torch.Tensor | None = None
    finite_padding: bool = False
    even_rows: bool = False
    offsets: torch.Tensor | None = None
    entries: torch.Tensor | None = None
    order: torch.Tensor | None = None
    raster: RasterTiles | None = None

    @property
    def has_valid_lengths(self) -> bool:
        """Whether blocks may be partial."""
        return self.q_lengths is not None or self.k_lengths is not None

    def streams_whole_rows(self, side: str) -> bool:
        """Whether blocks of this side may be read without masking each row (what lies past the tensor reads as 0)."""
        lengths = self.q_lengths if side == "q" else self.k_lengths
        return lengths is None or self.finite_padding

    def list_strides(self) -> tuple[int, int, int]:
        """Batch, head and row stride of the lists."""
        return (*broadcast_strides(self.blocks), self.blocks.stride(2))

    def count_strides(self) -> tuple[int, int]:
        """Batch and head stride of the counts."""
        return broadcast_strides(self.counts)

    def length_stride(self, side: str) -> int:
        """Batch stride of the valid lengths of a side, 0 where they are shared or missing."""
        lengths = self.q_lengths if side == "q" else self.k_lengths
        return 0 if lengths is None or lengths.shape[0] == 1 else lengths.stride(0)


def broadcast_strides(x: torch.Tensor) -> tuple[int, int]:
    """Batch and head stride, 0 where the dimension is broadcast."""
    batch, head = (0 if x.shape[i] == 1 else x.stride(i) for i in range(2))
    return batch, head


def index_arguments(index: IndexTensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """List, count and length pointers; a missing length tensor is stood in for by the counts, which are not read then."""
    q_lengths = index.counts if index.q_lengths is None else index.q_lengths
    k_lengths = index.counts if index.k_lengths is None else index.k_lengths
    return index.blocks, index.counts, q_lengths, k_lengths


def tma_strides(x: torch.Tensor) -> list[int]:
    """Strides of x [B, S, H, D] in the order [B, H, S, D]; a dimension of one element gets a stride that TMA accepts."""
    order = (0, 2, 1)
    return [x.shape[3] if x.shape[i] == 1 else x.stride(i) for i in order] + [1]


def tma_reason(name: str, x: torch.Tensor) -> str | None:
    """Why the tensor memory accelerator cannot address x [B, S, H, D], or None."""
    item = x.element_size()
    if x.data_ptr() % 16:
        return f"{name} starts at an address that 16 bytes do not divide"
    for stride in tma_strides(x)[:3]:
        if stride <= 0 or stride * item % 16 or stride * item >= 2**40:
            return f"{name} has a stride of {stride} elements ({stride * item} bytes); a positive multiple of 16 bytes is needed"
    return None


def raster_reason(raster: RasterTiles, *tensors: torch.Tensor) -> str | None:
    """Why the Hopper engine cannot fetch tiles of these tensors [B, S, H, D] from the raster, or None."""
    if not raster.fits_boxes():
        return f"tiles of {raster.tile} do not divide the grid {raster.grid} into boxes of 64 tokens"
    for x in tensors:
        if x.shape[3] != 128:
            return f"head_dim={x.shape[3]}; only for 128 are all kernels written for it"
        if x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
            return "the batch entries of a tensor do not follow one another"
        reason = tma_reason("a tensor", x)
        if reason:
            return reason
    return None


def raster_arguments(raster: RasterTiles | None) -> tuple[int, int]:
    """Lines and columns of the grid; of no account without a raster."""
    return (1, 1) if raster is None else raster.grid[1:]


def raster_constants(raster: RasterTiles | None) -> dict[str, int]:
    """Lines and columns of a tile; 0 without a raster."""
    _, lines, columns = (0, 0, 0) if raster is None else raster.tile
    return {"LINES": lines, "COLUMNS": columns}


def describe_rows(*pairs: tuple[torch.Tensor, int], d_pad: int):
    """Triton TMA descriptors of tensors [B, S, H, D], seen as [B, H, S, D], with boxes of `rows` x d_pad."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [
        TensorDescriptor(x, [x.shape[0], x.shape[2], x.shape[1], x.shape[3]], tma_strides(x), [1, 1, rows, d_pad])
        for x, rows in pairs
    ]
