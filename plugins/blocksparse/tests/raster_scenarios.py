"""Tiles of a raster against the same tokens put tile after tile: the same kernels on another layout, hence the same bits."""

import math

import torch

from attnmux_blocksparse import BlockIndex
from attnmux_blocksparse.kernels.arguments import IndexTensors, RasterTiles


def slots_in_raster_order(raster):
    """The raster token of every slot."""
    (time, height, width), (a, b, c) = raster.grid, raster.tile
    tokens = torch.arange(math.prod(raster.grid)).view(time // a, a, height // b, b, width // c, c)
    return tokens.permute(0, 2, 4, 1, 3, 5).flatten()


def make_raster(grid, tile, *, batch=2, heads=2, heads_k=1, head_dim=16, keep=0.5, dtype=torch.float32, device="cpu"):
    """q, k, v, dout in raster order, the token of every slot, and both indices: of tiles in a row, of tiles in the raster."""
    generator = torch.Generator().manual_seed(sum(grid))
    raster = RasterTiles(grid, tile)
    assert raster.fits_boxes()
    length, volume = math.prod(grid), math.prod(tile)
    q, k, v, dout = (
        torch.randn(batch, length, n, head_dim, generator=generator).to(device, dtype)
        for n in (heads, heads_k, heads_k, heads)
    )
    scores = torch.rand(batch, heads, length // volume, length // volume, generator=generator).to(device)
    index = BlockIndex.from_topk(scores, max(1, int(keep * length // volume)), block_q=volume, block_k=volume)
    tensors = (index.blocks, index.counts, volume, volume, None, None, False, True, *index.transpose())
    tokens = slots_in_raster_order(raster).to(device)
    return (q, k, v, dout), tokens, IndexTensors(*tensors), IndexTensors(*tensors, raster=raster)
