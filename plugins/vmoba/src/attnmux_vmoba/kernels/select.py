"""The choice of chunks by every query of every head, without a tensor of gates.

pool     sums of the keys of every chunk, piece by piece; of a single piece the mean
select   gates of a tile of queries against all mean keys, in registers; the choice goes out as bits

Gates are as exact as float32 products: a mean is split in three terms of the type of q, 24 bits in bfloat16 and 33 in float16,
and the products accumulate in float32, the small ones first.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from attnmux_vmoba.kernels.configs import select_config
from attnmux_vmoba.kernels.geometry import GEOMETRY, geometry_arguments, load_rows, raster_of

if TYPE_CHECKING:
    from attnmux_vmoba.prepare import ChunkGrid, Selection

PIECE = 512
TERMS = 3


@triton.jit
def _store_mean(term_ptr, mean, bh, chunk, n_chunks, TERMS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write the mean key [D_PAD] of a chunk as a sum of terms."""
    offs_d = tl.arange(0, D_PAD)
    for term in tl.static_range(TERMS):
        part = mean.to(term_ptr.dtype.element_ty)
        tl.store(term_ptr + ((bh * TERMS + term) * n_chunks + chunk) * D + offs_d, part, mask=offs_d < D)
        # what is infinite or NaN has no rest
        rest = mean - part.to(tl.float32)
        mean = tl.where(rest == rest, rest, 0.0)


@triton.jit(do_not_specialize=["n_heads", "n_pieces", *GEOMETRY])
def _vmoba_pool_kernel(
    k_ptr, sum_ptr, term_ptr, raster_ptr, stride_b, stride_s, stride_h, n_heads, n_pieces,
    n_h, n_w, box_t, box_h, box_w, grid_h, grid_w, chunk_tokens, length,
    PIECE: tl.constexpr, ROWS: tl.constexpr, TERMS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    chunk = tl.program_id(0) // n_pieces
    piece = tl.program_id(0) % n_pieces
    bh = tl.program_id(1).to(tl.int64)
    k_ptr += (bh // n_heads) * stride_b + (bh % n_heads) * stride_h
    end = tl.minimum(chunk_tokens, length - chunk * chunk_tokens)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, end), ROWS):
        place = start + tl.arange(0, ROWS)
        rows = raster_of(chunk, place, n_h, n_w, box_t, box_h, box_w, grid_h, grid_w)
        if bh == 0:
            tl.store(raster_ptr + chunk * chunk_tokens + place, rows, mask=place < end)
        acc += load_rows(k_ptr, rows, place < end, stride_s, D, D_PAD).to(tl.float32)
    total = tl.sum(acc, 0)
    if n_pieces == 1:
        _store_mean(term_ptr, total / end.to(tl.float32), bh, chunk, tl.num_programs(0), TERMS, D, D_PAD)
    else:
        offs_d = tl.arange(0, D_PAD)
        at = (bh * tl.num_programs(0) + tl.program_id(0)) * D
        tl.store(sum_ptr + at + offs_d, total, mask=offs_d < D)


@triton.jit(do_not_specialize=["n_pieces", "n_chunks", "chunk_tokens", "length"])
def _vmoba_mean_kernel(
    sum_ptr, term_ptr, n_pieces, n_chunks, chunk_tokens, length, TERMS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, D_PAD)
    mean = tl.zeros([D_PAD], tl.float32)
    for piece in range(n_pieces):
        at = ((bh * n_chunks + chunk) * n_pieces + piece) * D
        mean += tl.load(sum_ptr + at + offs_d, mask=offs_d < D, other=0.0)
    mean /= tl.minimum(chunk_tokens, length - chunk * chunk_tokens).to(tl.float32)
    _store_mean(term_ptr, mean, bh, chunk, n_chunks, TERMS, D, D_PAD)


@triton.jit
def _ranked(gates):
    """int32 keys in the order of the float32 gates: -0 equals 0, NaN is above infinity, and the least int32 is free."""
    # the sum makes +0 of -0
    bits = (gates + 0.0).to(tl.int32, bitcast=True)
    return tl.where(gates != gates, 0x7FFFFFFE, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _take_best(keys, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The largest key of every row, the first of equals: bool [ROWS, COLS]."""
    best = tl.max(keys, 1)
    first = tl.min(tl.where(keys == best[:, None], cols[None, :], COLS), 1)
    return cols[None, :] == first[:, None]


@triton.jit
def _within_share(gates, is_own, is_valid, cols, threshold, KEEPS_ONE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The prefix of the others, by falling gate, before which the share is below the threshold (see `reference.choose_chunks`).

    Bisection over the bits of the normalised gates finds the value at which the prefix ends; equal gates count one by one.
    """
    low = tl.min(tl.where(is_valid, gates, float("inf")), 1)
    high = tl.max(tl.where(is_valid, gates, float("-inf")), 1)
    spread = tl.where(high > low, high - low, 1.0)
    g = tl.where(is_valid & (high > low)[:, None], (gates - low[:, None]) / spread[:, None], 0.0)
    own = tl.sum(tl.where(is_own, g, 0.0), 1)
    limit = threshold * (tl.sum(g, 1) + 1e-6) - own
    is_other = is_valid & (is_own == 0)
    g = tl.where(is_other, g, 0.0)
    bits = g.to(tl.int32, bitcast=True)
    # above `upper` the others weigh less than the limit, above `lower` they do not
    lower = tl.full([ROWS], -1, tl.int32)
    upper = tl.full([ROWS], 0x3F800001, tl.int32)
    for _ in range(31):
        middle = (lower + upper) // 2
        is_below = tl.sum(tl.where(bits > middle[:, None], g, 0.0), 1) < limit
        upper = tl.where(is_below, middle, upper)
        lower = tl.where(is_below, lower, middle)
    above = tl.sum(tl.where(bits > upper[:, None], g, 0.0), 1)
    is_equal = (bits == upper[:, None]) & is_other
    equals = is_equal.to(tl.int32)
    before = (tl.cumsum(equals, 1) - equals).to(tl.float32) * upper.to(tl.float32, bitcast=True)[:, None]
    kept = is_other & ((bits > upper[:, None]) | (is_equal & (above[:, None] + before < limit[:, None])))
    kept = kept & (limit > 0.0)[:, None]
    # NaN compares with nothing and keeps everything; so does a threshold of 1, whatever the rounding of the sums
    has_nan = tl.max(tl.where(is_valid & (gates != gates), 1, 0), 1) > 0
    kept = kept | (is_other & (has_nan[:, None] | (threshold >= 1.0)))
    if KEEPS_ONE:
        least: tl.constexpr = -0x80000000
        kept = kept | (_take_best(tl.where(is_other, _ranked(gates), least), cols, ROWS, COLS) & is_other)
    return kept


@triton.jit(do_not_specialize=["n_heads", "n_chunks", "n_words", "topk", "threshold", "chunk_tokens", "length"])
def _vmoba_select_kernel(
    q_ptr, mean_ptr, word_ptr, raster_ptr, stride_b, stride_s, stride_h, n_heads, n_chunks, n_words, topk, threshold,
    chunk_tokens, length,
    GROUP: tl.constexpr, BY_SHARE: tl.constexpr, KEEPS_ONE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, STEP: tl.constexpr, TERMS: tl.constexpr,
):
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // n_heads
    head = bh % n_heads
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < length
    chunk = token // chunk_tokens
    rows = tl.load(raster_ptr + token, mask=is_token, other=0)
    q_ptr += batch * stride_b + head * stride_h
    mean_ptr += (batch * (n_heads // GROUP) + head // GROUP) * TERMS * n_chunks * D
    cols = tl.arange(0, COLS)
    gates = tl.zeros([ROWS, COLS], tl.float32)
    if STEP == D_PAD:
        # queries stay, and the means of the next term are on their way during a product
        q = load_rows(q_ptr, rows, is_token, stride_s, D, D_PAD)
        offs_d = tl.arange(0, D_PAD)
        for term in tl.range(0, TERMS, num_stages=2):
            at = mean_ptr + ((TERMS - 1 - term) * n_chunks + cols)[:, None] * D + offs_d[None, :]
            means = tl.load(at, mask=(cols < n_chunks)[:, None] & (offs_d < D)[None, :], other=0.0)
            gates = tl.dot(q, means.T, gates, input_precision="ieee")
    for term in tl.static_range(TERMS if STEP < D_PAD else 0):
        for start in tl.range(0, D_PAD, STEP, num_stages=1):
            offs_d = start + tl.arange(0, STEP)
            in_q = is_token[:, None] & (offs_d < D)[None, :]
            q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * stride_s + offs_d[None, :], mask=in_q, other=0.0)
            at = mean_ptr + ((TERMS - 1 - term) * n_chunks + cols)[:, None] * D + offs_d[None, :]
            means = tl.load(at, mask=(cols < n_chunks)[:, None] & (offs_d < D)[None, :], other=0.0)
            gates = tl.dot(q, means.T, gates, input_precision="ieee")
    is_valid = (cols < n_chunks)[None, :] & (token >= 0)[:, None]
    is_own = (cols[None, :] == chunk[:, None]) & is_valid
    if BY_SHARE:
        kept = is_own | _within_share(gates, is_own, is_valid, cols, threshold, KEEPS_ONE, ROWS, COLS)
    else:
        # the own chunk is above all others, what is no chunk below them: no masks are kept
        least: tl.constexpr = -0x80000000
        keys = tl.where(is_own, 0x7FFFFFFF, tl.where(is_valid, _ranked(gates), least))
        # The least of the best, by values alone: that is the whole choice unless gates are equal, and half the work.
        last = tl.full([ROWS], 0x7FFFFFFF, tl.int32)
        for _ in range(1, topk):
            last = tl.max(tl.where(keys < last[:, None], keys, least), 1)
        kept = keys >= last[:, None]
        if tl.max(tl.where(is_token, tl.abs(tl.sum(kept.to(tl.int32), 1) - topk), 0), 0) > 0:
            for _ in range(topk):
                keys = tl.where(_take_best(keys, cols, ROWS, COLS), least, keys)
            # no gate has the least key
            kept = (cols < n_chunks)[None, :] & (keys == least)
    bits = kept.to(tl.int32) << (cols % 32)[None, :]
    # static: which columns make a word is then known when it is compiled
    for word in tl.static_range((COLS + 31) // 32):
        if word < n_words:
            value = tl.sum(tl.where((cols // 32 == word)[None, :], bits, 0), 1)
            tl.store(word_ptr + (bh * n_words + word) * length + token, value, mask=is_token)


def mean_keys(k, chunks):
    """The mean key of every chunk as a sum of three terms in the type of k, the largest first: [B, H_kv, 3, C, D].

    And the raster position of every token, int32 [S], which divisions give once here.
    """
    B, S, heads, D = k.shape
    tokens, C = chunks.chunk_tokens, chunks.num_chunks
    pieces = triton.cdiv(tokens, PIECE)
    sums = torch.empty(B, heads, C, pieces, D, device=k.device, dtype=torch.float32)
    terms = torch.empty(B, heads, TERMS, C, D, device=k.device, dtype=k.dtype)
    raster = torch.empty(S, device=k.device, dtype=torch.int32)
    constants = {"TERMS": TERMS, "D": D, "D_PAD": triton.next_power_of_2(D)}
    _vmoba_pool_kernel[(C * pieces, B * heads)](
        k, sums, terms, raster, *k.stride()[:3], heads, pieces, *geometry_arguments(chunks),
        PIECE=PIECE, ROWS=32, **constants, num_warps=4)
    if pieces > 1:
        _vmoba_mean_kernel[(C, B * heads)](sums, terms, pieces, C, tokens, S, **constants, num_warps=1)
    return terms, raster


def launch_select(q: torch.Tensor, k: torch.Tensor, chunks: ChunkGrid, how: Selection):
    """The choice under scope "query_head" as bits, int32 [B, H, ceil(C / 32), S], tokens in chunk order."""
    B, S, heads, D = q.shape
    C = chunks.num_chunks
    n_words = triton.cdiv(C, 32)
    words = torch.empty(B, heads, n_words, S, device=q.device, dtype=torch.int32)
    with torch.cuda.device(q.device) if q.is_cuda else torch.no_grad():
        means, raster = mean_keys(k, chunks)
        cols = max(16, triton.next_power_of_2(C))
        config = select_config(cols)
        d_pad = triton.next_power_of_2(D)
        _vmoba_select_kernel[(triton.cdiv(S, config.rows), B * heads)](
            q, means, words, raster, *q.stride()[:3], heads, C, n_words, min(how.topk, C), float(how.threshold),
            chunks.chunk_tokens, S, GROUP=heads // k.shape[2], BY_SHARE=how.mode == "threshold",
            KEEPS_ONE=how.keeps_one, ROWS=config.rows, COLS=cols, D=D, D_PAD=d_pad, STEP=min(config.step, d_pad), TERMS=TERMS,
            num_warps=config.warps)
    return words
