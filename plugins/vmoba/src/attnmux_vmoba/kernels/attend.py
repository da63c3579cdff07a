"""Attention of the rows of sorted pairs to the chunks that they chose. Queries, keys and values are read where they lie.

A program owns a tile of rows that chose one chunk. It loads their queries by index and walks the keys of the chunk, by index too
where a chunk is a box. What it writes is the softmax over that chunk and its log-sum-exp; `copy.merge_parts` makes one of them.

In a crowded unit a program owns queries that follow one another, walks every chunk that one of them chose, masks the scores of the
others, and writes the result itself.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import triton
import triton.language as tl

from attnmux_vmoba.kernels.configs import AttendConfig
from attnmux_vmoba.kernels.geometry import load_rows, store_rows

LOG2_E = 1.4426950408889634
# rows of a tile of `sort`
FULL_TILE = 128


@triton.jit
def rows_of_tile(
    order_ptr, tile_ptr, raster_ptr, unit, n_units, n_rows, unit_tokens, length,
    CROWDED: tl.constexpr, TILE: tl.constexpr, FULL_TILE: tl.constexpr,
):
    """Numbers of the rows of a program, which are rows at all, their raster positions, and the chunk (unless crowded).

    The number of a row is its place among the sorted pairs, or its token where the unit is crowded. A program takes TILE of the
    FULL_TILE rows of a tile.
    """
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if CROWDED:
        numbers = unit % n_units * unit_tokens + offs
        is_row = (offs < unit_tokens) & (numbers < length)
        chunk = 0
        raster = tl.load(raster_ptr + numbers, mask=is_row, other=0)
    else:
        numbers = offs
        at = tile_ptr + (unit * (n_rows // FULL_TILE) + tl.program_id(0) * TILE // FULL_TILE) * 2
        chunk = tl.load(at)
        is_row = offs % FULL_TILE < tl.load(at + 1)
        raster = tl.load(order_ptr + unit * n_rows + offs, mask=is_row, other=0)
    return numbers, is_row, raster, chunk


@triton.jit
def is_member(word_ptr, chunk, token, is_row, length):
    """Which of the tokens of one head chose the chunk."""
    word = tl.load(word_ptr + chunk // 32 * length.to(tl.int64) + token, mask=is_row, other=0)
    return ((word >> (chunk % 32)) & 1) != 0


@triton.jit
def key_rows(raster_ptr, first, start, n_keys, IS_RUN: tl.constexpr, MASK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Raster positions of BLOCK keys of a chunk from its start-th on, and which are keys at all."""
    place = start + tl.arange(0, BLOCK)
    is_key = place < n_keys
    keys = first + place
    if not IS_RUN:
        keys = tl.load(raster_ptr + keys, mask=is_key, other=0) if MASK_K else tl.load(raster_ptr + keys)
    return keys, is_key


@triton.jit
def load_keys(ptr, keys, is_key, stride_s, MASK_K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of keys or values; only masked where something can be missing."""
    if MASK_K or D_PAD != D:
        rows = load_rows(ptr, keys, is_key, stride_s, D, D_PAD)
    else:
        rows = tl.load(ptr + keys.to(tl.int64)[:, None] * stride_s + tl.arange(0, D_PAD)[None, :])
    return rows


@triton.jit
def _attend_chunk(
    acc, m, l, q, keep, k_ptr, v_ptr, raster_ptr, stride_k_s, stride_v_s, first, n_keys, scale_log2,
    CROWDED: tl.constexpr, IS_RUN: tl.constexpr, MASK_K: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, STAGES: tl.constexpr,
):
    """One step of the running softmax in base 2 over a chunk's keys; `keep` says for which rows, if crowded."""
    for start in tl.range(0, n_keys, BLOCK, num_stages=STAGES):
        keys, is_key = key_rows(raster_ptr, first, start, n_keys, IS_RUN, MASK_K, BLOCK)
        k = load_keys(k_ptr, keys, is_key, stride_k_s, MASK_K, D, D_PAD)
        s = tl.dot(q, k.T) * scale_log2  # [TILE, BLOCK]
        if MASK_K:
            s = tl.where(is_key[None, :], s, float("-inf"))
        if CROWDED:
            s = tl.where(keep[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        acc = acc * alpha[:, None]
        v = load_keys(v_ptr, keys, is_key, stride_v_s, MASK_K, D, D_PAD)
        acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, m, l


@triton.jit(do_not_specialize=["first_unit", "n_units", "n_heads", "n_rows", "n_chunks", "n_words", "unit_tokens",
                               "chunk_tokens", "length"])
def _vmoba_fwd_kernel(
    q_ptr, k_ptr, v_ptr, dst_ptr, lse_ptr, order_ptr, tile_ptr, crowded_ptr, raster_ptr, word_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_dst_b, stride_dst_s, stride_dst_h,
    first_unit, n_units, n_heads, n_rows, n_chunks, n_words, unit_tokens, chunk_tokens, length, scale_log2,
    GROUP: tl.constexpr, CROWDED: tl.constexpr, IS_RUN: tl.constexpr, MASK_K: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, FULL_TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, STAGES: tl.constexpr,
):
    unit = (first_unit + tl.program_id(1)).to(tl.int64)
    if CROWDED:
        if tl.load(crowded_ptr + unit) == 0:
            return
    bh = unit // n_units
    batch = bh // n_heads
    head = bh % n_heads
    numbers, is_row, raster, chunk = rows_of_tile(
        order_ptr, tile_ptr, raster_ptr, unit, n_units, n_rows, unit_tokens, length, CROWDED, TILE, FULL_TILE)
    if tl.max(is_row.to(tl.int32), 0) == 0:
        return
    q = load_rows(q_ptr + batch * stride_q_b + head * stride_q_h, raster, is_row, stride_q_s, D, D_PAD)
    k_ptr += batch * stride_k_b + head // GROUP * stride_k_h
    v_ptr += batch * stride_v_b + head // GROUP * stride_v_h
    # A finite start keeps exp2(masked - maximum) at 0 where a whole step is masked; -inf - -inf would be NaN.
    m = tl.full([TILE], -1e30, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, D_PAD], tl.float32)
    if CROWDED:
        word_ptr += bh * n_words * length
        for c in range(n_chunks):
            keep = is_member(word_ptr, c, numbers, is_row, length)
            n_keys = tl.minimum(chunk_tokens, length - c * chunk_tokens) * tl.max(keep.to(tl.int32), 0)
            acc, m, l = _attend_chunk(
                acc, m, l, q, keep, k_ptr, v_ptr, raster_ptr, stride_k_s, stride_v_s, c * chunk_tokens, n_keys, scale_log2,
                CROWDED, IS_RUN, MASK_K, BLOCK, D, D_PAD, STAGES)
        dst_ptr += batch * stride_dst_b + head * stride_dst_h
        lse_ptr += bh * length
        to = raster
    else:
        n_keys = tl.minimum(chunk_tokens, length - chunk * chunk_tokens)
        acc, m, l = _attend_chunk(
            acc, m, l, q, is_row, k_ptr, v_ptr, raster_ptr, stride_k_s, stride_v_s, chunk * chunk_tokens, n_keys, scale_log2,
            CROWDED, IS_RUN, MASK_K, BLOCK, D, D_PAD, STAGES)
        dst_ptr += tl.program_id(1).to(tl.int64) * n_rows * D
        lse_ptr += tl.program_id(1).to(tl.int64) * n_rows
        to = numbers
    store_rows(dst_ptr, acc / l[:, None], to, is_row, stride_dst_s, D, D_PAD)
    tl.store(lse_ptr + numbers, (m + tl.log2(l)) * 0.6931471805599453, mask=is_row)


def launch_parts(q, k, v, words, pairs, tiles, parts, part_lse, first_unit, chunks, *, softmax_scale, config: AttendConfig) -> None:
    """Fill parts `[units of the slice, n_rows, D]` and their LSE from the units from `first_unit` on that are not crowded."""
    strides = (0, parts.stride(1), 0)
    grid = (parts.shape[1] // config.rows, parts.shape[0])
    _launch(q, k, v, words, pairs, tiles, parts, part_lse, strides, first_unit, chunks, softmax_scale, config, grid, crowded=False)


def launch_crowded(q, k, v, words, pairs, out, lse, chunks, *, softmax_scale, config: AttendConfig) -> None:
    """Fill the rows of out `[B, S, H, D]` and lse `[B, H, S]`, tokens in chunk order, of the crowded units."""
    grid = (triton.cdiv(pairs.unit_tokens, config.rows), pairs.units)
    _launch(q, k, v, words, pairs, pairs.order, out, lse, out.stride()[:3], 0, chunks, softmax_scale, config, grid, crowded=True)


def _launch(q, k, v, words, pairs, tiles, dst, lse, strides, first_unit, chunks, softmax_scale, config, grid, *, crowded):
    heads, D = q.shape[2:]
    _vmoba_fwd_kernel[grid](
        q, k, v, dst, lse, pairs.order, tiles, pairs.crowded, pairs.raster, words,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
        first_unit, pairs.per_head, heads, pairs.order.shape[3], chunks.num_chunks, words.shape[2], pairs.unit_tokens,
        chunks.chunk_tokens, chunks.length, softmax_scale * LOG2_E,
        GROUP=heads // k.shape[2], CROWDED=crowded, **chunk_constants(chunks, config.keys, D),
        TILE=config.rows, FULL_TILE=FULL_TILE, STAGES=stages_over_keys(chunks, config), num_warps=config.warps)


def stages_over_keys(chunks, config: AttendConfig) -> int:
    """Stages of a loop over keys: one more where their rows are found by an index, which is loaded a step earlier."""
    return config.stages + (not chunks.is_raster)


def chunk_constants(chunks, block: int, head_dim: int):
    """The compile-time arguments that kernels over keys share."""
    return {
        "IS_RUN": chunks.is_raster,
        "MASK_K": chunks.chunk_tokens % block != 0 or chunks.length % chunks.chunk_tokens != 0,
        "BLOCK": block,
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
    }
