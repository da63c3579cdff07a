"""The whole operator by kernels, forward and backward: which run, in which order, on which layout of tokens.

Where the tile divides the grid, the Hopper engine fetches tiles from the raster itself, and q, k and v are read once more for
their means alone. Elsewhere tokens are copied into tiles for the block-sparse operator, forward and again backward: keeping the
copies would cost memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

import attnmux_blocksparse.ops  # noqa: F401 - registers the operators that are called here
from attnmux_blocksparse.kernels import KernelRequest, hopper_reasons, launch
from attnmux_blocksparse.kernels.arguments import IndexTensors, RasterTiles, raster_reason
from attnmux_blocksparse.kernels.backward import launch_stats
from attnmux_vsa.kernels import coarse as means_attention
from attnmux_vsa.kernels import tiles
from attnmux_vsa.reference import keep_top_tiles, score_means

Triplet = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Geometry(NamedTuple):
    """Where tokens sit among the tiles: see `prepare.TileTables`; `tile` are the tokens of one along T, H and W."""

    token_of_slot: torch.Tensor
    slot_grid: torch.Tensor
    tile_sizes: torch.Tensor
    tile: tuple[int, int, int]

    @property
    def volume(self) -> int:
        """Slots of a tile."""
        return math.prod(self.tile)

    @property
    def k_lengths(self) -> torch.Tensor | None:
        """Tokens of every tile as the block-sparse operator takes them, None where all are full."""
        return self.tile_sizes[None] if self.token_of_slot.shape[0] != self.slot_grid.numel() else None

    def raster(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> RasterTiles | None:
        """The tiles as the Hopper engine fetches them from the raster, None where it cannot."""
        time, height, width = self.slot_grid.shape
        raster = RasterTiles((time, height, width), self.tile)
        if raster_reason(raster, q, k, v):
            return None
        return None if hopper_reasons(KernelRequest(q, k, v, self.volume, self.volume, scale)) else raster


class Forward(NamedTuple):
    """What the forward gives: the output, and what the backward takes besides the inputs.

    `fine` [B, N * M, H, D] (raster order where the kernels go by it) and all from `q_means` on are empty unless there is a
    gate and they are to be kept. lse [B, H, N * M] goes by slots, blocks [B, H, N, topk] are the kept tiles.
    """

    out: torch.Tensor
    fine: torch.Tensor
    lse: torch.Tensor
    blocks: torch.Tensor
    q_means: torch.Tensor
    k_means: torch.Tensor
    v_means: torch.Tensor
    coarse: torch.Tensor
    coarse_lse: torch.Tensor


def choose_tiles(
    q_means: torch.Tensor, k_means: torch.Tensor, topk: int, scale: float, conform: str | None
) -> torch.Tensor:
    """The kept tiles, int32 `[B, H, N, topk]`, ascending."""
    if conform is None:
        # of the scale only its sign matters for the order
        order = float((scale > 0) - (scale < 0))
        lists: torch.Tensor = torch.ops.attnmux_blocksparse.select(q_means, k_means, topk, 0, order)
        return lists
    heads = range(q_means.shape[1])
    group = q_means.shape[1] // k_means.shape[1]
    # head by head, so that the scores of one head are the largest tensor
    with torch.autocast(q_means.device.type, enabled=False):
        rows = [
            keep_top_tiles(
                score_means(q_means[:, h : h + 1], k_means[:, h // group, None], scale, conform=conform), topk
            )
            for h in heads
        ]
    return torch.cat(rows, dim=1).to(torch.int32)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    geometry: Geometry,
    topk: int,
    scale: float,
    conform: str | None,
    *,
    keeps: bool,
) -> Forward:
    """Attend; arguments as `ops.video_sparse_attention` has checked them. keeps: a backward will follow."""
    q, k, v = (_with_rows(x) for x in (q, k, v))
    n_tiles, volume = geometry.tile_sizes.shape[0], geometry.volume
    raster = geometry.raster(q, k, v, scale)
    inputs, means = tiles.read_inputs(
        q, k, v, geometry.token_of_slot, geometry.tile_sizes, with_tiles=raster is None, with_v_mean=gate is not None
    )
    blocks = choose_tiles(means[0], means[1], topk, scale, conform)
    counts = _counts(blocks)
    if inputs is None:
        index = IndexTensors(blocks, counts, volume, volume, even_rows=True, raster=raster)
        fine, lse = launch.attention_forward("hopper", q, k, v, index, scale)
    else:
        # Padding is zeros: queries there attend to something that is thrown away, and their gradients are zero.
        fine, lse = torch.ops.attnmux_blocksparse.forward(
            *(x.transpose(1, 2) for x in inputs), blocks, counts, None, geometry.k_lengths, None, None, None,
            volume, volume, True, True, scale, "",
        )  # fmt: skip
        del inputs
    coarse = None
    kept = [q.new_empty(0), *(q.new_empty(0, dtype=torch.float32) for _ in range(5))]
    if gate is not None:
        gate = _with_rows(gate)
        q_means, k_means, v_means = means
        coarse, coarse_lse = means_attention.coarse_attention(q_means, k_means, v_means, scale)
        if keeps:
            kept = [fine, *means, coarse, coarse_lse]
    # With neither a copy to undo nor a backward to keep it for, the fine branch becomes the output where it is.
    is_in_place = raster is not None and (gate is None or not keeps)
    out = fine if is_in_place else fine.new_empty(q.shape)
    if not is_in_place or gate is not None:
        tiles.untile(fine, coarse, gate, out, geometry.token_of_slot, n_tiles, in_tiles=raster is None)
    return Forward(out, kept[0], lse, blocks, *kept[1:])


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor | None,
    kept: Forward,
    geometry: Geometry,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of q, k, v and the gate, contiguous; kept: what the forward gave with `keeps`."""
    q, k, v = (_with_rows(x) for x in (q, k, v))
    token_of_slot, tile_sizes = geometry.token_of_slot, geometry.tile_sizes
    raster = geometry.raster(q, k, v, scale)
    if raster is not None and raster_reason(raster, dout):
        dout = dout.contiguous()
    dout = _with_rows(dout)
    dmeans: tuple[torch.Tensor | None, ...] = (None, None, None)
    dgate = None
    if gate is None:
        dout_tiles = tiles.tile(dout, token_of_slot, tile_sizes)
    else:
        dout_tiles, dcoarse, dgate = tiles.untile_backward(dout, _with_rows(gate), kept.coarse, token_of_slot)
        dmeans = means_attention.coarse_backward(
            dcoarse, kept.q_means, kept.k_means, kept.v_means, kept.coarse, kept.coarse_lse, scale
        )
    counts = _counts(kept.blocks)
    lists = torch.ops.attnmux_blocksparse.transpose(kept.blocks, counts, tile_sizes.shape[0])
    if raster is None:
        grads = _tiled_gradients(dout_tiles, q, k, v, kept, counts, lists, geometry, scale)
        del dout_tiles
    else:
        offsets, entries, order = lists
        index = IndexTensors(
            kept.blocks, counts, geometry.volume, geometry.volume, even_rows=True, raster=raster,
            offsets=offsets, entries=entries, order=order,
        )  # fmt: skip
        lse2, delta = launch_stats(kept.out if gate is None else kept.fine, dout, kept.lse, None, raster)
        q_tiles = tiles.tile(q, token_of_slot, tile_sizes)
        dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (k, v))
        launch.key_gradients(
            dout_tiles.transpose(1, 2), lse2, delta, q_tiles.transpose(1, 2), k, v, dk, dv, index, scale
        )
        # Before there is a dq: with it they would be the peak of a training step.
        del q_tiles, dout_tiles
        dq = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        launch.query_gradients("hopper", dout, lse2, delta, q, k, v, dq, index, scale)
        grads = (dq, dk, dv)
    results = []
    for x, grad, dmean in zip((q, k, v), grads, dmeans, strict=True):
        dx = grad if raster is not None else torch.empty(x.shape, device=x.device, dtype=x.dtype)
        if dx is not grad or dmean is not None:
            tiles.tile_backward(grad, dmean, token_of_slot, tile_sizes, dx)
        results.append(dx)
    return results[0], results[1], results[2], dgate


def _tiled_gradients(
    dout_tiles: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: Forward,
    counts: torch.Tensor,
    lists: Triplet,
    geometry: Geometry,
    scale: float,
) -> Triplet:
    """Gradients [B, N * M, H, D] of q, k and v in tiles."""
    rows = [tiles.tile(x, geometry.token_of_slot, geometry.tile_sizes).transpose(1, 2) for x in (q, k, v)]
    fine = kept.fine
    if fine.numel() == 0:
        fine = tiles.tile(kept.out, geometry.token_of_slot, geometry.tile_sizes).transpose(1, 2)
    grads: Triplet = torch.ops.attnmux_blocksparse.backward(
        dout_tiles.transpose(1, 2), None, *rows, fine, kept.lse, kept.blocks, counts, None, geometry.k_lengths, *lists,
        geometry.volume, geometry.volume, True, True, scale, "",
    )  # fmt: skip
    return grads


def _counts(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.new_full(blocks.shape[:3], blocks.shape[3])


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its last dimension is not contiguous, as that of an expanded gradient."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
