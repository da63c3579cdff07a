"""Attention over chosen chunks, slice by slice. Imported with triton, on first use.

Pairs of query and chunk are sorted by chunk (`sort`), so that a tile of 128 rows attends to one chunk and nothing is computed in
vain. Large chunks: queries are gathered to the rows of their pairs, and the block-sparse operator attends (`_gathered_*`). Small
ones: kernels of this plugin read rows by index (`_indexed_*`). Partial outputs are merged by their log-sum-exps; the backward pass
takes the merged output and log-sum-exp, with which the gradients of every part are exact, and sums dQ over the parts.

Ranges of queries that agree on their chunks are not sorted but walked, without partial outputs, by the kernels by index. The device
decides, and both ways are always launched: programs without work end at once.

Heads are taken in slices, so that what is gathered, or partial, stays small next to q, k, v and the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from attnmux_blocksparse.kernels import KernelRequest, hopper_reasons
from attnmux_blocksparse.kernels import launch as block_sparse
from attnmux_blocksparse.kernels.arguments import IndexTensors
from attnmux_vmoba.kernels import attend, copy, differentiate, sort
from attnmux_vmoba.kernels.configs import attend_configs

if TYPE_CHECKING:
    from attnmux_vmoba.kernels.relaunch import Launches

# Of the bytes of q, k, v and out (backward: and of their gradients), what the tables of the sort and the buffers of a slice
# of heads may take, so that the peak stays below 1.3 times that of dense attention.
FORWARD_SHARE = 0.35
BACKWARD_SHARE = 0.57

# From this many tokens a chunk on the operator runs on gathered rows. Reading by index spares the host the launches of copies, and
# only there ranges are walked. H100, 12 heads, forward, operator / by index: chunks of 1,920 2.44 / 3.32 ms (walked, where queries
# agree: 3.18), of 384 9.2 / 3.2 ms (in a CUDA graph 3.0 / 3.2).
OPERATOR_CHUNK_TOKENS = 1024

# A range is walked where that computes at most so many times the scores of its pairs. H100, chunks of 384, top-k 8: the tiles and
# merging them take as long as walking 1.7 times the scores, in the backward pass (dQ alone) 1.45 times.
FORWARD_WASTE = 1.6
BACKWARD_WASTE = 1.4

# Where queries keep different numbers of chunks there is room for a quarter of all pairs, and for this many a query at least.
LEAST_KEPT = 8
# A head is not split into units of fewer queries: each pads the rows of every chunk.
LEAST_UNIT = 4 * sort.TILE


def key_layout(chunks):
    """Tokens of a key block, tokens of a chunk padded to whole blocks, and whether keys are read where they lie."""
    tokens = chunks.chunk_tokens
    block = 128 if tokens % 128 == 0 else 64
    padded = -(-tokens // block) * block
    return block, padded, chunks.is_raster and padded == tokens


def heads_per_slice(
    heads: int, group: int, bytes_per_head: int, bytes_per_key_head: int, budget: float, whole_groups: bool
) -> int:
    """Query heads of one slice: a part of one group, or whole groups; the fewest slices that fit, of about equal size."""
    fitting = max(1, int(budget / (bytes_per_head + bytes_per_key_head / group)))
    if fitting >= group or whole_groups:
        groups = heads // group
        slices = -(-groups // max(1, fitting // group))
        return -(-groups // slices) * group
    while group % fitting:
        fitting -= 1
    return fitting


def _slices(q, k, per_slice: int):
    """(sample, query heads, key heads) of every slice; the last of a sample may be smaller."""
    heads = q.shape[2]
    group = heads // k.shape[2]
    for b in range(q.shape[0]):
        for first in range(0, heads, per_slice):
            end = min(first + per_slice, heads)
            yield b, slice(first, end), slice(first // group, (end - 1) // group + 1)


class _Keys:
    """Keys and values of one slice as the operator reads them, `[1, rows, h, D]`, and their blocks."""

    def __init__(self, chunks) -> None:
        self.chunks = chunks
        self.block, self.padded, self.in_place = key_layout(chunks)
        self.chunk_blocks = self.padded // self.block
        last = chunks.length - (chunks.num_chunks - 1) * chunks.chunk_tokens
        self.last_blocks = -(-last // self.block)
        self.num_blocks = (chunks.num_chunks - 1) * self.chunk_blocks + self.last_blocks
        # the last block of the sequence may be short anyway; a list of lengths costs more, so it is made where it must be
        self.needs_lengths = not self.in_place and chunks.chunk_tokens % self.block != 0

    @property
    def rows(self) -> int:
        """Rows of the keys in chunk order."""
        return self.num_blocks * self.block

    def buffers(self, number: int, k, query_heads: int, group: int):
        """`number` tensors `[rows, h, D]`, heads outermost in memory, for slices of so many query heads; none if in place."""
        if self.in_place:
            return (None,) * number
        heads = max(1, query_heads // group)
        return (
            torch.empty(number, heads, self.rows, k.shape[3], device=k.device, dtype=k.dtype).transpose(1, 2).unbind(0)
        )

    def arrange(self, launches, k, v, k_buffer, v_buffer):
        """Arrange k and v `[S, h, D]` -> `[1, rows, h, D]`."""
        if self.in_place:
            return k[None], v[None]
        k_, v_ = k_buffer[:, : k.shape[1]], v_buffer[:, : k.shape[1]]
        copy.to_chunks(launches, k, v, k_, v_, self.chunks, self.padded)
        return k_[None], v_[None]

    def lengths(self, device):
        """Valid tokens of every block, int32 [1, N_k], or None where all are full but for the end of the sequence."""
        if not self.needs_lengths:
            return None
        first = torch.arange(self.num_blocks, device=device) * self.block
        chunk, place = first // self.padded, first % self.padded
        tokens = (self.chunks.length - chunk * self.chunks.chunk_tokens).clamp(max=self.chunks.chunk_tokens)
        return (tokens - place).clamp(0, self.block).to(torch.int32)[None]


def _index(keys: _Keys, lists, lengths, b: int, heads: slice, transposed=None) -> IndexTensors:
    blocks, counts, *parts = (x[b : b + 1, heads] for x in (*lists, *(transposed or ())))
    return IndexTensors(blocks, counts, sort.TILE, keys.block, None, lengths, True, True, *parts)


def attention_forward(q, k, v, words, chunks, topk: int, softmax_scale: float):
    """Attention of every query over its chosen chunks.

    Args:
        q: `[B, S, H, D]` in raster order; a half type.
        k: `[B, S, H_kv, D]`, likewise.
        v: like k.
        words: the choice, int32 `[B, H, ceil(C / 32), S]`.
        chunks: the chunks.
        topk: chunks of every query, >= 1, or 0 where queries keep different numbers.
        softmax_scale: factor on the scores.

    Returns:
        out `[B, S, H, D]`, contiguous, in raster order, and lse float32 `[B, H, S]` in chunk order.
    """
    topk = min(topk, chunks.num_chunks)
    budget = _budget(q, k, FORWARD_SHARE * 2)
    is_gathered = takes_operator(q, chunks, topk or chunks.num_chunks, budget)
    forward = _gathered_forward if is_gathered else _indexed_forward
    with torch.cuda.device(q.device):
        return forward(q, k, v, words, chunks, topk, softmax_scale)


def _budget(q, k, share: float) -> float:
    """Bytes of a share of q and k."""
    return share * (q.numel() + k.numel()) * q.element_size()


def _beside_tables(budget: float, rows: int) -> float:
    """What is left beside the tables of the sort: 4 bytes for every pair and for every row, of all heads."""
    return max(budget - 8 * rows, budget / 4)


def takes_operator(q, chunks, kept: int, budget: float) -> bool:
    """Whether the block-sparse operator runs on gathered rows, rather than the kernels that read by index.

    The rows of a head, `kept` for every query, must fit the budget beside the tables of all heads.
    """
    rows = q.shape[1] * kept
    left = _beside_tables(budget, q.shape[0] * q.shape[2] * rows)
    return chunks.chunk_tokens >= OPERATOR_CHUNK_TOKENS and rows * q.shape[3] * q.element_size() <= left


def room(chunks, topk: int) -> int:
    """Chunks a query for which there is room, the mean over a unit."""
    return topk or min(chunks.num_chunks, max(LEAST_KEPT, -(-chunks.num_chunks // 4)))


def may_overflow(chunks, topk: int) -> bool:
    """Whether there can be more pairs than room."""
    return room(chunks, topk) < chunks.num_chunks and not topk


def _plan(q, words, chunks, topk: int, row_bytes: int, budget: float, most_waste: float, *, orders_walked: bool):
    """Sorted pairs, and the units of a slice whose rows, of `row_bytes` each, fit the budget beside the tables of the sort."""
    C, heads, S = chunks.num_chunks, q.shape[0] * q.shape[2], q.shape[1]
    kept = room(chunks, topk)
    per_head = S * kept + C * sort.TILE
    budget = _beside_tables(budget, heads * per_head)
    units = max(1, min(-(-per_head * row_bytes // max(1, int(budget))), -(-S // LEAST_UNIT)))
    pairs = sort.sort_pairs(words, chunks, kept, units, most_waste, orders_walked=orders_walked)
    fitting = max(1, int(budget / (pairs.tiles * sort.TILE * row_bytes)))
    slices = -(-heads * units // fitting)
    return pairs, -(-heads * units // slices)


def _indexed_forward(q, k, v, words, chunks, topk, softmax_scale):
    B, S, heads, D = q.shape
    budget = _budget(q, k, FORWARD_SHARE * 2)
    row_bytes = D * q.element_size() + 4
    pairs, per_slice = _plan(q, words, chunks, topk, row_bytes, budget, FORWARD_WASTE, orders_walked=False)
    tiles, configs = sort.describe_tiles(pairs), attend_configs(triton.next_power_of_2(D), chunks.chunk_tokens)
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(B, heads, S, device=q.device, dtype=torch.float32)
    attend.launch_walk(q, k, v, words, pairs, out, lse, chunks, softmax_scale=softmax_scale, config=configs.walk)
    options = {"softmax_scale": softmax_scale, "config": configs.forward}
    n_rows = pairs.tiles * sort.TILE
    parts = torch.empty(per_slice, n_rows, D, device=q.device, dtype=q.dtype)
    part_lse = torch.empty(per_slice, n_rows, device=q.device, dtype=torch.float32)
    launches: Launches = {}
    for first in range(0, pairs.units, per_slice):
        used = slice(0, min(per_slice, pairs.units - first))
        attend.launch_parts(launches, q, k, v, pairs, tiles, parts[used], part_lse[used], first, chunks, **options)
        copy.merge_parts(launches, parts[used], part_lse[used], pairs, first, out, lse)
    return out, lse


def _gathered_forward(q, k, v, words, chunks, topk, softmax_scale, engine=None):
    B, S, heads, D = q.shape
    keys = _Keys(chunks)
    pairs = sort.sort_pairs(words, chunks, topk or chunks.num_chunks)
    lengths, lists = keys.lengths(q.device), None
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(B, heads, S, device=q.device, dtype=torch.float32)
    n_rows, group = pairs.tiles * sort.TILE, heads // k.shape[2]
    row_bytes = D * q.element_size()
    key_bytes = 0 if keys.in_place else 2 * keys.rows * row_bytes
    budget = _beside_tables(_budget(q, k, FORWARD_SHARE * 2), B * heads * n_rows) / B
    per_slice = heads_per_slice(heads, group, n_rows * (row_bytes + 4), key_bytes, budget, whole_groups=False)
    part_buffer = torch.empty(per_slice, n_rows, D, device=q.device, dtype=q.dtype)
    key_buffers = keys.buffers(2, k, per_slice, group)
    launches: Launches = {}
    for b, qh, kh in _slices(q, k, per_slice):
        k_, v_ = keys.arrange(launches, k[b, :, kh], v[b, :, kh], *key_buffers)
        parts = part_buffer[: qh.stop - qh.start]
        copy.gather_queries(launches, q, pairs, b * heads + qh.start, parts)
        # only now: while the device copies, the host has time for them
        lists = lists or sort.tile_lists(pairs, keys.chunk_blocks, keys.last_blocks)
        index = _index(keys, lists, lengths, b, qh)
        engine = engine or choose_operator(parts, k_, v_, index, softmax_scale)
        part_lse = run_operator(parts, k_, v_, index, softmax_scale, engine)
        copy.merge_parts(launches, parts, part_lse, pairs, b * heads + qh.start, out, lse)
    return out, lse


def choose_operator(parts, k, v, index, softmax_scale) -> str:
    """The engine of the block-sparse operator for a slice, of those that can write in place; the same for every slice."""
    request = KernelRequest(parts.transpose(0, 1)[None], k, v, index.block_q, index.block_k, softmax_scale)
    return "triton" if hopper_reasons(request) else "hopper"


def run_operator(parts, k, v, index, softmax_scale, engine):
    """Replace the queries `[h, rows, D]` by their outputs, in place; the LSE `[h, rows]`."""
    rows = parts.transpose(0, 1)[None]
    return block_sparse.attention_forward(engine, rows, k, v, index, softmax_scale, out=rows)[1][0]


def attention_backward(dout, q, k, v, out, lse, words, chunks, topk: int, softmax_scale: float):
    """The gradients dq, dk, dv, contiguous, in the shapes and types of q, k, v; arguments as in the forward."""
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    topk = min(topk, chunks.num_chunks)
    # gathered are queries and their gradients
    budget = _budget(q, k, BACKWARD_SHARE * 4) / 2
    is_gathered = takes_operator(q, chunks, room(chunks, topk), budget)
    backward = _gathered_backward if is_gathered else _indexed_backward
    with torch.cuda.device(q.device):
        return backward(dout, q, k, v, out, lse, words, chunks, topk, softmax_scale)


def _indexed_backward(dout, q, k, v, out, lse, words, chunks, topk, softmax_scale):
    D = q.shape[3]
    budget = _budget(q, k, BACKWARD_SHARE * 4)
    row_bytes = D * q.element_size()
    pairs, per_slice = _plan(q, words, chunks, topk, row_bytes, budget, BACKWARD_WASTE, orders_walked=True)
    tiles, configs = sort.describe_tiles(pairs), attend_configs(triton.next_power_of_2(D), chunks.chunk_tokens)
    stats = differentiate.launch_stats(out, dout, lse, pairs)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    differentiate.launch_dkdv(
        q, k, v, dout, stats, words, pairs, dk, dv, chunks,
        softmax_scale=softmax_scale, config=configs.dkdv, may_overflow=may_overflow(chunks, topk),
    )  # fmt: skip
    options = {"softmax_scale": softmax_scale, "config": configs.dq}
    differentiate.launch_dq_walk(q, k, v, dout, stats, words, pairs, dq, chunks, **options)
    parts = torch.empty(per_slice, pairs.tiles * sort.TILE, D, device=q.device, dtype=q.dtype)
    launches: Launches = {}
    for first in range(0, pairs.units, per_slice):
        used = parts[: min(per_slice, pairs.units - first)]
        differentiate.launch_dq_parts(launches, q, k, v, dout, stats, pairs, tiles, used, first, chunks, **options)
        copy.sum_parts(launches, used, pairs, first, dq)
    return dq, dk, dv


def _gathered_backward(dout, q, k, v, out, lse, words, chunks, topk, softmax_scale, engine=None):
    heads, D = q.shape[2:]
    keys = _Keys(chunks)
    pairs = sort.sort_pairs(words, chunks, room(chunks, topk))
    lengths, lists, transposed = keys.lengths(q.device), None, None
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    n_rows, group = pairs.tiles * sort.TILE, heads // k.shape[2]
    row_bytes = D * q.element_size()
    key_bytes = 0 if keys.in_place else 4 * keys.rows * row_bytes
    budget = _beside_tables(_budget(q, k, BACKWARD_SHARE * 4), q.shape[0] * heads * n_rows) / q.shape[0]
    per_slice = heads_per_slice(heads, group, n_rows * (2 * row_bytes + 8), key_bytes, budget, whole_groups=True)
    part_buffers = torch.empty(2, per_slice, n_rows, D, device=q.device, dtype=q.dtype)
    stat_buffers = torch.empty(2, per_slice, -(-n_rows // 256) * 256, device=q.device, dtype=torch.float32)
    *key_buffers, dk_buffer, dv_buffer = keys.buffers(4, k, per_slice, group)
    launches: Launches = {}
    for b, qh, kh in _slices(q, k, per_slice):
        k_, v_ = keys.arrange(launches, k[b, :, kh], v[b, :, kh], *key_buffers)
        dk_, dv_ = dk[b, :, kh], dv[b, :, kh]
        if not keys.in_place:
            dk_, dv_ = dk_buffer[:, : dk_.shape[1]], dv_buffer[:, : dk_.shape[1]]
        (parts, do), stats = part_buffers[:, : qh.stop - qh.start], stat_buffers[:, : qh.stop - qh.start]
        copy.gather_for_backward(launches, q, dout, out, lse, pairs, b * heads + qh.start, parts, do, stats)
        # after the copies, as in the forward
        lists = lists or sort.tile_lists(pairs, keys.chunk_blocks, keys.last_blocks)
        transposed = transposed or sort.transposed_lists(pairs, keys.chunk_blocks, keys.last_blocks)
        index = _index(keys, lists, lengths, b, qh, transposed)
        engine = engine or choose_operator(parts, k_, v_, index, softmax_scale)
        differentiate_operator(
            parts, do, stats[0], stats[1], k_, v_, dk_[None], dv_[None], index, softmax_scale, engine
        )
        copy.sum_parts(launches, parts, pairs, b * heads + qh.start, dq)
        if not keys.in_place:
            copy.from_chunks(launches, dk_, dv_, dk[b, :, kh], dv[b, :, kh], chunks, keys.padded)
    if may_overflow(chunks, topk):
        configs = attend_configs(triton.next_power_of_2(D), chunks.chunk_tokens)
        stats = differentiate.launch_stats(out, dout, lse, pairs)
        differentiate.launch_dkdv(
            q, k, v, dout, stats, words, pairs, dk, dv, chunks,
            softmax_scale=softmax_scale, config=configs.dkdv, may_overflow=True, adds=True,
        )  # fmt: skip
        differentiate.launch_dq_walk(
            q, k, v, dout, stats, words, pairs, dq, chunks, softmax_scale=softmax_scale, config=configs.dq
        )
    return dq, dk, dv


def differentiate_operator(parts, dout, lse2, delta, k, v, dk, dv, index, softmax_scale, engine) -> None:
    """Replace the queries `[h, rows, D]` by their gradients, in place, and fill dk and dv `[1, rows, h, D]`."""
    rows, do = parts.transpose(0, 1)[None], dout.transpose(0, 1)[None]
    block_sparse.attention_gradients(
        engine, do, lse2[None], delta[None], rows, k, v, rows, dk, dv, index, softmax_scale
    )
