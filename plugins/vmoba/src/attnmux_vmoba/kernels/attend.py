"""Attention of queries to the chunks that they chose. Queries, keys and values are read where they lie.

parts   a program owns a tile of rows that chose one chunk. It loads their queries by index and goes over the keys of the chunk,
        by index too where a chunk is a box. What it writes is the softmax over that chunk and its log-sum-exp;
        `copy.merge_parts` makes one of them.
walk    a program owns queries of a walked range, goes over every chunk that one of them chose, masks the scores of the others,
        and writes the result itself.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import triton
import triton.language as tl

from attnmux_vmoba.kernels.configs import AttendConfig
from attnmux_vmoba.kernels.geometry import is_wide, load_rows, offsets_of, store_rows
from attnmux_vmoba.kernels.relaunch import Launches, launch

LOG2_E = 1.4426950408889634
# rows of a tile of `sort`, queries of a range
FULL_TILE = 128


@triton.jit
def rows_of_tile(order_ptr, tile_ptr, at, TILE: tl.constexpr, FULL_TILE: tl.constexpr):
    """Chunk of TILE sorted pairs, the at-th of all units, how many of them are rows at all, which, and their raster positions."""
    full = tile_ptr + at * TILE // FULL_TILE * 2
    n = tl.load(full + 1) - at * TILE % FULL_TILE
    is_row = tl.arange(0, TILE) < n
    return tl.load(full), n, is_row, tl.load(order_ptr + at * TILE + tl.arange(0, TILE), mask=is_row, other=0)


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
def load_keys(ptr, keys, is_key, stride_s, MASK_K: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr):
    """Rows of keys or values; only masked where something can be missing."""
    if MASK_K or D_PAD != D:
        rows = load_rows(ptr, keys, is_key, stride_s, D, D_PAD, WIDE)
    else:
        rows = tl.load(ptr + offsets_of(keys, stride_s, WIDE)[:, None] + tl.arange(0, D_PAD)[None, :])
    return rows


@triton.jit
def keys_of_step(
    walked_ptr, raster_ptr, i, chunk_blocks, chunk_tokens, length, IS_RUN: tl.constexpr, MASK_K: tl.constexpr, BLOCK: tl.constexpr,
):
    """The chunk of the i-th step of a walk, and its keys as `key_rows` has them. A chunk takes chunk_blocks steps."""
    chunk = tl.load(walked_ptr + i // chunk_blocks)
    first = chunk * chunk_tokens
    n_keys = tl.minimum(chunk_tokens, length - first)
    keys, is_key = key_rows(raster_ptr, first, i % chunk_blocks * BLOCK, n_keys, IS_RUN, MASK_K, BLOCK)
    return chunk, keys, is_key


@triton.jit
def is_member(word_ptr, chunk, token, is_row, length):
    """Which of the tokens of one head chose the chunk."""
    word = tl.load(word_ptr + chunk // 32 * length.to(tl.int64) + token, mask=is_row, other=0)
    return ((word >> (chunk % 32)) & 1) != 0


@triton.jit
def _add_keys(
    acc, m, l, s, keep, v_ptr, keys, is_key, stride_v_s, scale_log2, MASK_ROWS: tl.constexpr, MASK_K: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr,
):
    """A step of the running softmax in base 2 over products s [TILE, BLOCK], with MASK_ROWS of kept rows alone; scale_log2 >= 0."""
    # Scores are scaled in the exponent, by one instruction with the subtraction, wherever none is masked.
    if MASK_K:
        s = tl.where(is_key[None, :], s * scale_log2, float("-inf"))
        peak = tl.max(s, 1)
    else:
        peak = tl.max(s, 1) * scale_log2
    m_new = tl.maximum(m, peak)
    subtracted = m_new
    if MASK_ROWS:
        m_new = tl.where(keep, m_new, m)
        subtracted = tl.where(keep, m_new, float("inf"))
    p = tl.exp2(s - subtracted[:, None]) if MASK_K else tl.exp2(s * scale_log2 - subtracted[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v = load_keys(v_ptr, keys, is_key, stride_v_s, MASK_K, D, D_PAD, WIDE)
    return tl.dot(p.to(v.dtype), v, acc), m_new, l


@triton.jit(do_not_specialize=["first_unit", "n_units", "n_heads", "n_rows", "chunk_tokens", "length"])
def _vmoba_fwd_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, order_ptr, tile_ptr, used_ptr, raster_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    first_unit, n_units, n_heads, n_rows, chunk_tokens, length, scale_log2,
    GROUP: tl.constexpr, NEGATE: tl.constexpr, IS_RUN: tl.constexpr, MASK_K: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, FULL_TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):
    unit = (first_unit + tl.program_id(1)).to(tl.int64)
    batch = unit // n_units // n_heads
    head = unit // n_units % n_heads
    q_ptr += batch * stride_q_b + head * stride_q_h
    k_ptr += batch * stride_k_b + head // GROUP * stride_k_h
    v_ptr += batch * stride_v_b + head // GROUP * stride_v_h
    part_ptr += tl.program_id(1).to(tl.int64) * n_rows * D
    part_lse_ptr += tl.program_id(1).to(tl.int64) * n_rows
    for tile in range(tl.program_id(0), tl.load(used_ptr + unit) * (FULL_TILE // TILE), tl.num_programs(0)):
        chunk, n, is_row, raster = rows_of_tile(order_ptr, tile_ptr, unit * (n_rows // TILE) + tile, TILE, FULL_TILE)
        if n > 0:
            q = load_rows(q_ptr, raster, is_row, stride_q_s, D, D_PAD)
            if NEGATE:
                q = -q
            # A finite start keeps exp2(masked - maximum) at 0 where a whole step is masked; -inf - -inf would be NaN.
            m = tl.full([TILE], -1e30, tl.float32)
            l = tl.zeros([TILE], tl.float32)
            acc = tl.zeros([TILE, D_PAD], tl.float32)
            first = chunk * chunk_tokens
            n_keys = tl.minimum(chunk_tokens, length - first)
            for start in tl.range(0, n_keys, BLOCK, num_stages=STAGES):
                keys, is_key = key_rows(raster_ptr, first, start, n_keys, IS_RUN, MASK_K, BLOCK)
                k = load_keys(k_ptr, keys, is_key, stride_k_s, MASK_K, D, D_PAD, WIDE)
                acc, m, l = _add_keys(
                    acc, m, l, tl.dot(q, k.T), is_row, v_ptr, keys, is_key, stride_v_s, scale_log2, False, MASK_K, D, D_PAD, WIDE)
            numbers = tile * TILE + tl.arange(0, TILE)
            store_rows(part_ptr, acc / l[:, None], numbers, is_row, D, D, D_PAD)
            tl.store(part_lse_ptr + numbers, (m + tl.log2(l)) * 0.6931471805599453, mask=is_row)


@triton.jit(do_not_specialize=["n_heads", "n_ranges", "n_chunks", "n_words", "chunk_blocks", "chunk_tokens",
                               "length"])
def _vmoba_fwd_walk_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, walk_ptr, walked_ptr, raster_ptr, word_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_out_b, stride_out_s, stride_out_h,
    n_heads, n_ranges, n_chunks, n_words, chunk_blocks, chunk_tokens, length, scale_log2,
    GROUP: tl.constexpr, NEGATE: tl.constexpr, IS_RUN: tl.constexpr, MASK_K: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, FULL_TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):
    bh = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = bh * n_ranges + tl.program_id(0) * TILE // FULL_TILE
    n = tl.load(walk_ptr + at)
    if n == 0:
        return
    walked_ptr += at * n_chunks
    word_ptr += bh * n_words * length
    batch = bh // n_heads
    head = bh % n_heads
    is_row = token < length
    raster = tl.load(raster_ptr + token, mask=is_row, other=0)
    q = load_rows(q_ptr + batch * stride_q_b + head * stride_q_h, raster, is_row, stride_q_s, D, D_PAD)
    if NEGATE:
        q = -q
    k_ptr += batch * stride_k_b + head // GROUP * stride_k_h
    v_ptr += batch * stride_v_b + head // GROUP * stride_v_h
    m = tl.full([TILE], -1e30, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, D_PAD], tl.float32)
    # One loop over all steps: one over chunks around one over their keys would fill its pipeline again for every chunk.
    for i in tl.range(0, n * chunk_blocks, num_stages=STAGES):
        chunk, keys, is_key = keys_of_step(
            walked_ptr, raster_ptr, i, chunk_blocks, chunk_tokens, length, IS_RUN, MASK_K, BLOCK)
        k = load_keys(k_ptr, keys, is_key, stride_k_s, MASK_K, D, D_PAD, WIDE)
        keep = is_member(word_ptr, chunk, token, is_row, length)
        acc, m, l = _add_keys(
            acc, m, l, tl.dot(q, k.T), keep, v_ptr, keys, is_key, stride_v_s, scale_log2, True, MASK_K, D, D_PAD, WIDE)
    out_ptr += batch * stride_out_b + head * stride_out_h
    store_rows(out_ptr, acc / l[:, None], raster, is_row, stride_out_s, D, D_PAD)
    tl.store(lse_ptr + bh * length + token, (m + tl.log2(l)) * 0.6931471805599453, mask=is_row)


def launch_parts(
    launches: Launches, q, k, v, pairs, tiles, parts, part_lse, first_unit, chunks, *, softmax_scale, config: AttendConfig
) -> None:
    """Fill parts `[units of the slice, n_rows, D]` and their LSE from the units from `first_unit` on."""
    heads = q.shape[2]
    n_units, n_rows = parts.shape[:2]
    launch(
        launches, _vmoba_fwd_kernel, (triton.cdiv(n_rows // config.rows, config.tiles), n_units, 1),
        q, k, v, parts, part_lse, pairs.order, *tiles, pairs.raster, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        first_unit, pairs.per_head, heads, n_rows, chunks.chunk_tokens, chunks.length, abs(softmax_scale) * LOG2_E,
        GROUP=heads // k.shape[2], NEGATE=softmax_scale < 0, **chunk_constants(chunks, config.keys, q, k, v),
        TILE=config.rows, FULL_TILE=FULL_TILE, STAGES=stages_over_keys(chunks, config), num_warps=config.warps)


def launch_walk(q, k, v, words, pairs, out, lse, chunks, *, softmax_scale, config: AttendConfig) -> None:
    """Fill the rows of out `[B, S, H, D]` and lse `[B, H, S]`, tokens in chunk order, of the walked ranges."""
    batch, length, heads = q.shape[:3]
    _vmoba_fwd_walk_kernel[(triton.cdiv(length, config.rows), batch * heads)](
        q, k, v, out, lse, pairs.walks, pairs.walked, pairs.raster, words,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, *walk_arguments(pairs, words, chunks, config.keys), abs(softmax_scale) * LOG2_E,
        GROUP=heads // k.shape[2], NEGATE=softmax_scale < 0, **chunk_constants(chunks, config.keys, q, k, v),
        TILE=config.rows, FULL_TILE=FULL_TILE, STAGES=stages_over_keys(chunks, config), num_warps=config.warps)


def stages_over_keys(chunks, config: AttendConfig) -> int:
    """Stages of a loop over keys: one more where their rows are found by an index, which is loaded a step earlier."""
    return config.stages + (not chunks.is_raster)


def walk_arguments(pairs, words, chunks, block: int):
    """The numbers that kernels take to walk: n_ranges, n_chunks, n_words, chunk_blocks, chunk_tokens, length."""
    C, tokens = chunks.num_chunks, chunks.chunk_tokens
    return pairs.walks.shape[2], C, words.shape[2], triton.cdiv(tokens, block), tokens, chunks.length


def chunk_constants(chunks, block: int, *tensors):
    """The compile-time arguments that kernels over keys share; the tensors `[B, S, H, D]` are those that loops read."""
    head_dim = tensors[0].shape[3]
    return {
        "IS_RUN": chunks.is_raster,
        "MASK_K": chunks.chunk_tokens % block != 0 or chunks.length % chunks.chunk_tokens != 0,
        "BLOCK": block,
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
        "WIDE": is_wide(*tensors),
    }
