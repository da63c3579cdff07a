"""Block-sparse attention forward for Hopper, warp-specialised, in Gluon.

Roles in one CTA (one CTA per multiprocessor, persistent over query tiles):
  producer   1 warp   walks the block list and fills the K and V rings through TMA
  consumer 0 4 warps  rows 0 .. 63 of the tile (Gluon's default partition)
  consumer 1 4 warps  rows 64 .. 127

Key blocks are walked in sub-blocks of 64 keys, PAIR of them a stage: two make products of N = 128, which read Q from shared memory
half as often. With an odd number the first stage is half empty: its second half is loaded with the same sub-block and masked. An
empty list still takes one stage, all masked, because waits go by parity and no role may skip a phase.

Within a consumer S(j+1) = Q K(j+1)^T is issued before O += P(j) V(j), and the softmax of S(j+1) runs while the second product is
on the tensor cores. The last O += P V of a tile likewise overlaps the first softmax of the next.

SPLIT is for 64-row query blocks: each consumer has a query tile, list, ring and producer warp of its own.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from dataclasses import replace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnmux_blocksparse.kernels.arguments import LOG2_E, IndexTensors, index_arguments
from attnmux_blocksparse.kernels.configs import HOPPER_FORWARD
from attnmux_blocksparse.kernels.hopper_loads import (
    CONSUMER_REGISTERS,
    clear_padding,
    describe,
    last_block_tokens,
    load_box,
    load_stage,
    load_stage_whole,
    place_in_raster,
    place_of,
    sub_block,
    valid_keys,
)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, list_ptr, count_ptr, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, n_tiles, n_tiles_head, n_heads, len_q, len_k,
    GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, PAIR: gl.constexpr, STAGES: gl.constexpr,
    QBUF: gl.constexpr, D: gl.constexpr, WG: gl.constexpr, SPLIT: gl.constexpr,
):
    PANELS: gl.constexpr = D // 64
    PER: gl.constexpr = PANELS * PAIR
    # Both sub-blocks of a stage lie in one block, and no list is odd.
    WHOLE: gl.constexpr = PAIR == 2 and BLOCK_K % 128 == 0
    HALVES: gl.constexpr = 1 if SPLIT else 2
    first = gl.program_id(0)
    step = gl.num_programs(0)
    if SPLIT:
        # One tile in all: both consumers compute it, to the same values.
        first = gl.minimum(first * 2 + WG, n_tiles - 1)
        step = step * 2
    ks = 0
    kph = 1
    vs = 0
    vph = 1
    qs = 0
    qph = 1
    for tile in range(first, n_tiles, step):
        batch, head, place = place_of(tile, n_tiles_head, n_heads)
        head_k = head // GROUP
        row = place * (64 * HALVES)
        block_q = row // BLOCK_Q
        n = gl.load(count_ptr + batch.to(gl.int64) * stride_count_b + head.to(gl.int64) * stride_count_h + block_q)
        n *= BLOCK_K // 64
        blocks = (list_ptr + batch.to(gl.int64) * stride_list_b + head.to(gl.int64) * stride_list_h
                  + block_q.to(gl.int64) * stride_list_q)
        stages = gl.maximum((n + PAIR - 1) // PAIR, 1)
        odd = stages * PAIR - n
        _, a = sub_block(blocks, 0, n, BLOCK_K)
        if PAIR == 2:
            _, b = sub_block(blocks, 1 - odd, n, BLOCK_K)
        else:
            b = a
        mbarrier.wait(q_empty.index(qs), qph)
        mbarrier.expect(q_full.index(qs), HALVES * 64 * D * 2)
        for w in gl.static_range(HALVES):
            for p in gl.static_range(PANELS):
                load_box(q_desc, q_full.index(qs), q_buf, (qs * HALVES + w) * PANELS + p, batch, head, row + w * 64, p * 64,
                         len_q, BLOCK_Q)
        qs += 1
        if qs == QBUF:
            qs = 0
            qph ^= 1
        # + 0: after a plain `pa = a` Triton 3.6 takes pa for loop-invariant (the loop body assigns it "the same object").
        pa = a + 0
        pb = b + 0
        for j in range(stages + 1):
            if j < stages:
                mbarrier.wait(k_empty.index(ks), kph)
                if WHOLE:
                    load_stage_whole(k_desc, k_full.index(ks), k_buf, ks * PER, batch, head_k, a, len_k, BLOCK_K, PANELS)
                else:
                    load_stage(k_desc, k_full.index(ks), k_buf, ks * PER, batch, head_k, a, b, len_k, BLOCK_K, PAIR, PANELS)
                ks += 1
                if ks == STAGES:
                    ks = 0
                    kph ^= 1
            # The next entries are on their way while this warp waits for room in the V ring.
            _, na = sub_block(blocks, (j + 1) * PAIR - odd, n, BLOCK_K)
            if PAIR == 2:
                _, nb = sub_block(blocks, (j + 1) * PAIR - odd + 1, n, BLOCK_K)
            else:
                nb = na
            if j > 0:
                mbarrier.wait(v_empty.index(vs), vph)
                if WHOLE:
                    load_stage_whole(v_desc, v_full.index(vs), v_buf, vs * PER, batch, head_k, pa, len_k, BLOCK_K, PANELS)
                else:
                    load_stage(v_desc, v_full.index(vs), v_buf, vs * PER, batch, head_k, pa, pb, len_k, BLOCK_K, PAIR, PANELS)
                vs += 1
                if vs == STAGES:
                    vs = 0
                    vph ^= 1
            pa = a
            pb = b
            a = na
            b = nb


@gluon.jit
def _mask_scores(s, valid_a, valid_b, BN: gl.constexpr, PAIR: gl.constexpr):
    """-inf beyond the valid keys of the one or two sub-blocks of a stage."""
    cols = gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout))
    keep = cols < valid_a
    if PAIR == 2:
        keep = keep | ((cols >= 64) & (cols < 64 + valid_b))
        keep = keep & ((cols < valid_a) | (cols >= 64))
    return gl.where(keep[None, :], s, float("-inf"))


@gluon.jit
def _stage_valid(blocks, j, n, odd, end_last, k_len_ptr, len_k, BLOCK_K: gl.constexpr, PAIR: gl.constexpr,
                 HAS_K_LEN: gl.constexpr, MASK_K: gl.constexpr):
    """Valid keys of the two sub-blocks of stage j; of full blocks only stage 0 can lack some."""
    FULL: gl.constexpr = 64
    valid_a = FULL + 0 * n
    valid_b = FULL + 0 * n
    if MASK_K:
        valid_a = valid_keys(blocks, j * PAIR - odd, n, end_last, k_len_ptr, len_k, BLOCK_K, HAS_K_LEN)
        if PAIR == 2:
            valid_b = valid_keys(blocks, j * PAIR - odd + 1, n, end_last, k_len_ptr, len_k, BLOCK_K, HAS_K_LEN)
    if PAIR == 2:
        if (j == 0) & (odd > 0):
            valid_b = valid_b * 0
    if n == 0:
        valid_a = valid_a * 0
    return valid_a, valid_b


@gluon.jit
def _first_softmax(s, valid_a, valid_b, scale2, BN: gl.constexpr, PAIR: gl.constexpr):
    """Softmax of a tile's first stage. The floor keeps a fully masked row at weights of 0 instead of NaN."""
    if PAIR == 2:
        if valid_a + valid_b < BN:
            s = _mask_scores(s, valid_a, valid_b, BN, PAIR)
    else:
        if valid_a < BN:
            s = _mask_scores(s, valid_a, valid_b, BN, PAIR)
    m = gl.maximum(gl.max(s, 1), -1e30)
    p = gl.exp2(s * scale2 - (m * scale2)[:, None])
    return p, m, gl.sum(p, 1)


@gluon.jit
def _store_tile(o, m, l, o_desc, lse_ptr, o_buf, batch, head, n_heads, row, end_q, len_q, scale2, DTYPE: gl.constexpr,
                BLOCK_Q: gl.constexpr, D: gl.constexpr, WG: gl.constexpr):
    """Normalise and write 64 rows of the output and of the log-sum-exp."""
    OL: gl.constexpr = o.type.layout
    RO: gl.constexpr = gl.SliceLayout(1, OL)
    rows = row + gl.arange(0, 64, layout=m.type.layout)
    is_empty = (l == 0.0) | (rows >= end_q)
    l = gl.where(is_empty, 1.0, l)
    lse = gl.where(is_empty, float("-inf"), (m * scale2 + gl.log2(l)) * 0.6931471805599453)
    # A factor of 0 would keep a NaN that came in through padding.
    factor = gl.convert_layout(gl.where(is_empty, 0.0, 1.0 / l), RO)[:, None]
    o = gl.where(factor == 0.0, 0.0, o * factor).to(DTYPE)
    o_s = o_buf.index(WG)
    tma.store_wait(0)
    o_s._reinterpret(DTYPE, [64, D], gl.NVMMASharedLayout(128, 16, 2)).store(o)
    fence_async_shared()
    if len(o_desc.block_shape) == 5:
        frame, line, place = place_in_raster(o_desc, batch, row, len_q, BLOCK_Q)
        tma.async_copy_shared_to_global(o_desc, [frame, line, place, head, 0],
                                        o_s._reinterpret(DTYPE, o_desc.block_shape, o_desc.layout))
    else:
        tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_s)
    base = lse_ptr + (batch.to(gl.int64) * n_heads + head) * len_q
    gl.store(base + rows, lse, mask=rows < len_q)


@gluon.jit
def _consumer(
    o_desc, lse_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, q_buf, k_buf, v_buf, o_buf,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
    n_tiles, n_tiles_head, n_heads, len_q, len_k, scale2,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, PAIR: gl.constexpr, STAGES: gl.constexpr, QBUF: gl.constexpr,
    D: gl.constexpr, WG: gl.constexpr, SPLIT: gl.constexpr, HAS_Q_LEN: gl.constexpr, HAS_K_LEN: gl.constexpr,
    MASK_K: gl.constexpr, CLEAR: gl.constexpr,
):
    DTYPE: gl.constexpr = o_desc.dtype
    BN: gl.constexpr = 64 * PAIR
    PANELS: gl.constexpr = D // 64
    PER: gl.constexpr = PANELS * PAIR
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    RO: gl.constexpr = gl.SliceLayout(1, OL)
    HALVES: gl.constexpr = 1 if SPLIT else 2
    HALF: gl.constexpr = 0 if SPLIT else WG
    q_ring = q_buf._reinterpret(DTYPE, [QBUF * HALVES, 64, D], SH)
    k_ring = k_buf._reinterpret(DTYPE, [STAGES, BN, D], SH)
    v_ring = v_buf._reinterpret(DTYPE, [STAGES, BN, D], SH)
    first = gl.program_id(0)
    step = gl.num_programs(0)
    if SPLIT:
        # One tile in all: both consumers compute it, to the same values.
        first = gl.minimum(first * 2 + WG, n_tiles - 1)
        step = step * 2

    ks = 0
    kph = 0
    vs = 0
    vph = 0
    qs = 0
    qph = 0
    zero = gl.zeros([64, BN], gl.float32, SL)

    # First stage of the first tile.
    batch, head, place = place_of(first, n_tiles_head, n_heads)
    block_q = place * (64 * HALVES) // BLOCK_Q
    n = gl.load(count_ptr + batch.to(gl.int64) * stride_count_b + head.to(gl.int64) * stride_count_h + block_q) * (BLOCK_K // 64)
    blocks = (list_ptr + batch.to(gl.int64) * stride_list_b + head.to(gl.int64) * stride_list_h
              + block_q.to(gl.int64) * stride_list_q)
    stages = gl.maximum((n + PAIR - 1) // PAIR, 1)
    odd = stages * PAIR - n
    k_len = k_len_ptr + batch.to(gl.int64) * stride_klen_b
    end_last = len_k
    if MASK_K and not HAS_K_LEN:
        end_last = last_block_tokens(blocks, n, len_k, BLOCK_K)
    valid_a, valid_b = _stage_valid(blocks, 0, n, odd, end_last, k_len, len_k, BLOCK_K, PAIR, HAS_K_LEN, MASK_K)
    mbarrier.wait(q_full.index(qs), qph)
    mbarrier.wait(k_full.index(ks), kph)
    s_acc = warpgroup_mma(q_ring.index(qs * HALVES + HALF), k_ring.index(ks).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_acc])
    mbarrier.arrive(k_empty.index(ks))
    if QBUF == 1:
        mbarrier.arrive(q_empty.index(qs), pred=stages == 1)
    ks += 1
    if ks == STAGES:
        ks = 0
        kph ^= 1
    p, m, l = _first_softmax(s, valid_a, valid_b, scale2, BN, PAIR)
    pb = gl.convert_layout(p.to(DTYPE), PL)
    mbarrier.wait(k_full.index(ks), kph, pred=stages > 1)

    for tile in range(first, n_tiles, step):
        # Here m, l, pb belong to stage 0 of this tile, and its stage 1 of K has arrived.
        batch, head, place = place_of(tile, n_tiles_head, n_heads)
        row = place * (64 * HALVES) + HALF * 64
        more = tile + step < n_tiles
        next_batch, next_head, next_place = place_of(gl.minimum(tile + step, n_tiles - 1), n_tiles_head, n_heads)
        next_q = next_place * (64 * HALVES) // BLOCK_Q
        next_n = gl.load(count_ptr + next_batch.to(gl.int64) * stride_count_b + next_head.to(gl.int64) * stride_count_h + next_q)
        next_n *= BLOCK_K // 64
        o = gl.zeros([64, D], gl.float32, OL)
        q = q_ring.index(qs * HALVES + HALF)

        for j in range(1, stages):
            s_acc = warpgroup_mma(q, k_ring.index(ks).permute((1, 0)), zero, use_acc=False, is_async=True)
            if MASK_K:
                next_a, next_b = _stage_valid(blocks, j, n, odd, end_last, k_len, len_k, BLOCK_K, PAIR, HAS_K_LEN, MASK_K)
            mbarrier.wait(v_full.index(vs), vph)
            if CLEAR:
                if (valid_a < 64) | (valid_b < 64):
                    clear_padding(v_buf, vs * PER, valid_a, valid_b, DTYPE, PAIR, PANELS)
            o_acc = warpgroup_mma(pb, v_ring.index(vs), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_acc])
            mbarrier.arrive(k_empty.index(ks))
            if QBUF == 1:
                # A branch: an arrival always comes with a barrier of the consumer, its predicate false or not.
                if j + 1 == stages:
                    mbarrier.arrive(q_empty.index(qs))
            ks += 1
            if ks == STAGES:
                ks = 0
                kph ^= 1
            if MASK_K:
                if (next_a < 64) | (next_b < 64):
                    s = _mask_scores(s, next_a, next_b, BN, PAIR)
                if CLEAR:
                    valid_a = next_a
                    valid_b = next_b
            m_new = gl.maximum(m, gl.max(s, 1))
            alpha = gl.exp2((m - m_new) * scale2)
            p = gl.exp2(s * scale2 - (m_new * scale2)[:, None])
            l = l * alpha + gl.sum(p, 1)
            m = m_new
            # Naming pb_new as a dependency keeps LLVM from sinking the exponentials behind the wait; ptxas would
            # still hoist the wait above them, but it does not schedule across a branch, and waiting here for the
            # next K stage puts one in its way. Without both, the softmax does not overlap the P V product.
            pb_new = gl.convert_layout(p.to(DTYPE), PL)
            mbarrier.wait(k_full.index(ks), kph, pred=j + 1 < stages)
            o, pb, pb_new = warpgroup_mma_wait(0, deps=[o_acc, pb, pb_new])
            pb = pb_new
            mbarrier.arrive(v_empty.index(vs))
            vs += 1
            if vs == STAGES:
                vs = 0
                vph ^= 1
            o = o * gl.convert_layout(alpha, RO)[:, None]

        # The last P V of this tile overlaps the first softmax of the next.
        if QBUF > 1:
            mbarrier.arrive(q_empty.index(qs))
        qs += 1
        if qs == QBUF:
            qs = 0
            qph ^= 1
        n = next_n
        stages = gl.maximum((n + PAIR - 1) // PAIR, 1)
        odd = stages * PAIR - n
        blocks = (list_ptr + next_batch.to(gl.int64) * stride_list_b + next_head.to(gl.int64) * stride_list_h
                  + next_q.to(gl.int64) * stride_list_q)
        k_len = k_len_ptr + next_batch.to(gl.int64) * stride_klen_b
        if MASK_K and not HAS_K_LEN:
            end_last = last_block_tokens(blocks, n, len_k, BLOCK_K)
        next_a, next_b = _stage_valid(blocks, 0, n, odd, end_last, k_len, len_k, BLOCK_K, PAIR, HAS_K_LEN, MASK_K)
        m_done = m
        l_done = l
        if more:
            mbarrier.wait(q_full.index(qs), qph)
            mbarrier.wait(k_full.index(ks), kph)
            s_acc = warpgroup_mma(q_ring.index(qs * HALVES + HALF), k_ring.index(ks).permute((1, 0)), zero,
                                  use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(vs), vph)
            if CLEAR:
                if (valid_a < 64) | (valid_b < 64):
                    clear_padding(v_buf, vs * PER, valid_a, valid_b, DTYPE, PAIR, PANELS)
            o_acc = warpgroup_mma(pb, v_ring.index(vs), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_acc])
            mbarrier.arrive(k_empty.index(ks))
            if QBUF == 1:
                mbarrier.arrive(q_empty.index(qs), pred=stages == 1)
            ks += 1
            if ks == STAGES:
                ks = 0
                kph ^= 1
            p, m, l = _first_softmax(s, next_a, next_b, scale2, BN, PAIR)
            pb_new = gl.convert_layout(p.to(DTYPE), PL)
            mbarrier.wait(k_full.index(ks), kph, pred=stages > 1)
            o, pb, pb_new = warpgroup_mma_wait(0, deps=[o_acc, pb, pb_new])
            pb = pb_new
        else:
            mbarrier.wait(v_full.index(vs), vph)
            if CLEAR:
                if (valid_a < 64) | (valid_b < 64):
                    clear_padding(v_buf, vs * PER, valid_a, valid_b, DTYPE, PAIR, PANELS)
            o_acc = warpgroup_mma(pb, v_ring.index(vs), o, is_async=True)
            o, pb = warpgroup_mma_wait(0, deps=[o_acc, pb])
        if CLEAR:
            valid_a = next_a
            valid_b = next_b
        mbarrier.arrive(v_empty.index(vs))
        vs += 1
        if vs == STAGES:
            vs = 0
            vph ^= 1
        block_q = row // BLOCK_Q
        end_q = gl.minimum((block_q + 1) * BLOCK_Q, len_q)
        if HAS_Q_LEN:
            length = gl.load(q_len_ptr + batch.to(gl.int64) * stride_qlen_b + block_q)
            end_q = gl.minimum(block_q * BLOCK_Q + length, end_q)
        _store_tile(o, m_done, l_done, o_desc, lse_ptr, o_buf, batch, head, n_heads, row, end_q, len_q, scale2, DTYPE, BLOCK_Q, D,
                    WG)
    tma.store_wait(0)


@gluon.jit
def _ring(DTYPE: gl.constexpr, STAGES: gl.constexpr, QBUF: gl.constexpr, PANELS: gl.constexpr, PAIR: gl.constexpr,
          HALVES: gl.constexpr):
    """Shared memory and barriers of one producer: q, k, v buffers and (full, empty) barriers; HALVES = its consumers."""
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    q_buf = gl.allocate_shared_memory(DTYPE, [QBUF * HALVES * PANELS, 1, 1, 64, 64], SH)
    k_buf = gl.allocate_shared_memory(DTYPE, [STAGES * PANELS * PAIR, 1, 1, 64, 64], SH)
    v_buf = gl.allocate_shared_memory(DTYPE, [STAGES * PANELS * PAIR, 1, 1, 64, 64], SH)
    q_full = gl.allocate_shared_memory(gl.int64, [QBUF, 1], BL)
    q_empty = gl.allocate_shared_memory(gl.int64, [QBUF, 1], BL)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    for i in gl.static_range(QBUF):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=HALVES)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=HALVES)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=HALVES)
    return q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty


@gluon.jit(do_not_specialize=["stride_list_b", "stride_list_h", "stride_list_q", "stride_count_b", "stride_count_h",
                              "stride_qlen_b", "stride_klen_b", "n_tiles", "n_tiles_head", "n_heads", "len_q", "len_k"])
def _blocksparse_hopper_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
    n_tiles, n_tiles_head, n_heads, len_q, len_k, scale2,
    GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr, PAIR: gl.constexpr,
    STAGES: gl.constexpr, QBUF: gl.constexpr, SPLIT: gl.constexpr, HAS_Q_LEN: gl.constexpr, HAS_K_LEN: gl.constexpr,
    MASK_K: gl.constexpr, CLEAR: gl.constexpr, CREGS: gl.constexpr, num_warps: gl.constexpr,
):
    PANELS: gl.constexpr = D // 64
    o_buf = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, 64, D], gl.NVMMASharedLayout(128, 16, 4))
    if SPLIT:
        qa, ka, va, qfa, qea, kfa, kea, vfa, vea = _ring(o_desc.dtype, STAGES, QBUF, PANELS, PAIR, 1)
        qc, kc, vc, qfc, qec, kfc, kec, vfc, vec = _ring(o_desc.dtype, STAGES, QBUF, PANELS, PAIR, 1)
        gl.warp_specialize([
            (_consumer, (o_desc, lse_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, qa, ka, va, o_buf,
                         qfa, qea, kfa, kea, vfa, vea,
                         stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
                         n_tiles, n_tiles_head, n_heads, len_q, len_k, scale2,
                         BLOCK_Q, BLOCK_K, PAIR, STAGES, QBUF, D, 0, SPLIT, HAS_Q_LEN, HAS_K_LEN, MASK_K, CLEAR)),
            (_consumer, (o_desc, lse_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, qc, kc, vc, o_buf,
                         qfc, qec, kfc, kec, vfc, vec,
                         stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
                         n_tiles, n_tiles_head, n_heads, len_q, len_k, scale2,
                         BLOCK_Q, BLOCK_K, PAIR, STAGES, QBUF, D, 1, SPLIT, HAS_Q_LEN, HAS_K_LEN, MASK_K, CLEAR)),
            (_producer, (q_desc, k_desc, v_desc, list_ptr, count_ptr, qa, ka, va, qfa, qea, kfa, kea, vfa, vea,
                         stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                         n_tiles, n_tiles_head, n_heads, len_q, len_k, GROUP, BLOCK_Q, BLOCK_K, PAIR, STAGES, QBUF, D, 0, SPLIT)),
            (_producer, (q_desc, k_desc, v_desc, list_ptr, count_ptr, qc, kc, vc, qfc, qec, kfc, kec, vfc, vec,
                         stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                         n_tiles, n_tiles_head, n_heads, len_q, len_k, GROUP, BLOCK_Q, BLOCK_K, PAIR, STAGES, QBUF, D, 1, SPLIT)),
        ], [4, 1, 1], [CREGS, 24, 24])
    else:
        q, k, v, qf, qe, kf, ke, vf, ve = _ring(o_desc.dtype, STAGES, QBUF, PANELS, PAIR, 2)
        gl.warp_specialize([
            (_consumer, (o_desc, lse_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, q, k, v, o_buf, qf, qe, kf, ke, vf, ve,
                         stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
                         n_tiles, n_tiles_head, n_heads, len_q, len_k, scale2,
                         BLOCK_Q, BLOCK_K, PAIR, STAGES, QBUF, D, 0, SPLIT, HAS_Q_LEN, HAS_K_LEN, MASK_K, CLEAR)),
            (_consumer, (o_desc, lse_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, q, k, v, o_buf, qf, qe, kf, ke, vf, ve,
                         stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
                         n_tiles, n_tiles_head, n_heads, len_q, len_k, scale2,
                         BLOCK_Q, BLOCK_K, PAIR, STAGES, QBUF, D, 1, SPLIT, HAS_Q_LEN, HAS_K_LEN, MASK_K, CLEAR)),
            (_producer, (q_desc, k_desc, v_desc, list_ptr, count_ptr, q, k, v, qf, qe, kf, ke, vf, ve,
                         stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                         n_tiles, n_tiles_head, n_heads, len_q, len_k, GROUP, BLOCK_Q, BLOCK_K, PAIR, STAGES, QBUF, D, 0, SPLIT)),
        ], [4, 1], [CREGS, 24])


def multiprocessor_count(device) -> int:
    """Streaming multiprocessors of the card: the persistent kernels start one CTA on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_hopper_forward(
    q, k, v, out, lse, index: IndexTensors, *, softmax_scale: float, config=None, multiprocessors: int | None = None
):
    """Fill out [B, S_q, H, D] (contiguous) and lse [B, H, S_q]; see `kernels.hopper_reasons` for what it takes."""
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1], k.shape[2]
    config = config or replace(HOPPER_FORWARD[head_dim, min(index.block_q, 128)], is_persistent=index.even_rows)
    n_tiles_head = -(-len_q // (64 if config.split else 128))
    n_tiles = batch * heads * n_tiles_head
    programs = max(n_tiles // 2, 1) if config.split else n_tiles
    if config.is_persistent:
        programs = min(multiprocessors or multiprocessor_count(q.device), programs)
    list_arguments = index_arguments(index)
    rows_k = 128 if config.pair == 2 and index.block_k % 128 == 0 else 64
    return _blocksparse_hopper_fwd_kernel[(programs,)](
        describe(q, 64, 64, index.raster), describe(k, rows_k, 64, index.raster), describe(v, rows_k, 64, index.raster),
        describe(out, 64, head_dim, index.raster), lse, *list_arguments,
        *index.list_strides(), *index.count_strides(), index.length_stride("q"), index.length_stride("k"),
        n_tiles, n_tiles_head, heads, len_q, len_k, softmax_scale * LOG2_E,
        GROUP=heads // heads_k, BLOCK_Q=index.block_q, BLOCK_K=index.block_k, D=head_dim, PAIR=config.pair,
        STAGES=config.stages, QBUF=config.query_buffers, SPLIT=config.split,
        HAS_Q_LEN=index.q_lengths is not None, HAS_K_LEN=index.k_lengths is not None,
        MASK_K=index.k_lengths is not None or len_k % index.block_k != 0,
        CLEAR=not index.streams_whole_rows("k"), CREGS=CONSUMER_REGISTERS, num_warps=4,
    )
