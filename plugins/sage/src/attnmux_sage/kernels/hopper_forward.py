"""Quantised attention forward for Hopper, warp-specialised, in Gluon: INT8 Q K^T, P V in e4m3 or the type of v.

Roles in one CTA (one CTA per multiprocessor, persistent over query tiles where the lists are even):
  producer   1 warp   walks the key blocks and fills the K and V rings through TMA
  consumer 0 4 warps  rows 0 .. 63 of the tile (Gluon's default partition)
  consumer 1 4 warps  rows 64 .. 127

A stage is two blocks of 64 keys. Blocks are walked from the last of the list to the first, and with an odd number of them the
first stage is half empty: its second half is loaded with the same block and masked. So the first stage alone is masked, also
where the last block of the sequence is short. An empty list still takes one stage, all masked, because waits go by parity and
no role may skip a phase.

Within a consumer S(j+1) = Q K(j+1)^T is issued before P(j) V(j), and the softmax of S(j+1) runs while the second product is on
the tensor cores; sums are rescaled while the first is. The last P V of a tile likewise overlaps the first softmax of the next.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attnmux_blocksparse.kernels.arguments import broadcast_strides
from attnmux_sage.kernels.configs import HopperConfig, hopper_config
from attnmux_sage.kernels.hopper_softmax import pack, ready, rescale, softmax
from attnmux_sage.kernels.quantise import launch_list_scales
from attnmux_sage.prepare import P_SHIFT, QuantisedTensors

# The consumers' registers; the launch gives every thread 168, and the producer gives its own up.
CONSUMER_REGISTERS = 240


@gluon.jit
def _place(tile, tiles, heads, group):
    """Batch, head, key head's number over all batches, and position within the head of a tile."""
    bh = tile // tiles
    batch = bh // heads
    head = bh % heads
    return batch, head, batch * (heads // group) + head // group, tile % tiles


@gluon.jit
def _kept(count_ptr, batch, head, place, stride_count_b, stride_count_h, blocks_k, LISTS: gl.constexpr):
    """Number of key blocks of a tile."""
    if LISTS:
        return gl.load(count_ptr + batch.to(gl.int64) * stride_count_b + head.to(gl.int64) * stride_count_h + place)
    else:
        return blocks_k + 0 * place


@gluon.jit
def _entries(list_ptr, batch, head, place, stride_b, stride_h, stride_q):
    """Pointer to the list of a tile."""
    return list_ptr + batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h + place.to(gl.int64) * stride_q


@gluon.jit
def _from_end(i, n):
    """Index of the i-th entry from the end, clamped into the list."""
    return gl.maximum(n - 1 - gl.maximum(i, 0), 0)


@gluon.jit
def _block(entries, i, n, LISTS: gl.constexpr):
    """The i-th key block from the end of the list; block 0 for an empty one."""
    at = _from_end(i, n)
    if LISTS:
        return gl.where(n > 0, gl.load(entries + at), 0)
    else:
        return at


@gluon.jit
def _load_values(v_desc, bar, buf, base, batch, head_k, bh_k, blocks_k, a, b, D: gl.constexpr, FP8: gl.constexpr):
    """Fill one stage of the V ring with two blocks."""
    if FP8:
        mbarrier.expect(bar, 2 * 64 * D)
        row = bh_k * blocks_k
        tma.async_copy_global_to_shared(v_desc, [(row + a) * D, 0], bar, buf.index(base))
        tma.async_copy_global_to_shared(v_desc, [(row + b) * D, 0], bar, buf.index(base + 1))
    else:
        mbarrier.expect(bar, 2 * 64 * D * 2)
        for p in gl.static_range(D // 64):
            tma.async_copy_global_to_shared(v_desc, [batch, head_k, a * 64, p * 64], bar, buf.index(base + p * 2))
            tma.async_copy_global_to_shared(v_desc, [batch, head_k, b * 64, p * 64], bar, buf.index(base + p * 2 + 1))


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, list_ptr, count_ptr, q_buf, k_buf, v_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, n_tiles, tiles, heads, group, blocks_k,
    D: gl.constexpr, STAGES: gl.constexpr, QBUF: gl.constexpr, FP8: gl.constexpr, LISTS: gl.constexpr,
):
    PER_V: gl.constexpr = 2 if FP8 else 2 * (D // 64)
    ks = 0
    kph = 1
    vs = 0
    vph = 1
    qs = 0
    qph = 1
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        batch, head, bh_k, place = _place(tile, tiles, heads, group)
        head_k = head // group
        n = _kept(count_ptr, batch, head, place, stride_count_b, stride_count_h, blocks_k, LISTS)
        entries = _entries(list_ptr, batch, head, place, stride_list_b, stride_list_h, stride_list_q)
        stages = gl.maximum((n + 1) // 2, 1)
        odd = stages * 2 - n
        a = _block(entries, 0, n, LISTS)
        b = _block(entries, 1 - odd, n, LISTS)
        mbarrier.wait(q_empty.index(qs), qph)
        mbarrier.expect(q_full.index(qs), 2 * 64 * D)
        for w in gl.static_range(2):
            tma.async_copy_global_to_shared(q_desc, [(tile * 2 + w) * 64, 0], q_full.index(qs), q_buf.index(qs * 2 + w))
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
                mbarrier.expect(k_full.index(ks), 2 * 64 * D)
                row = bh_k * blocks_k
                tma.async_copy_global_to_shared(k_desc, [(row + a) * 64, 0], k_full.index(ks), k_buf.index(ks * 2))
                tma.async_copy_global_to_shared(k_desc, [(row + b) * 64, 0], k_full.index(ks), k_buf.index(ks * 2 + 1))
                ks += 1
                if ks == STAGES:
                    ks = 0
                    kph ^= 1
            # The next entries are on their way while this warp waits for room in the V ring.
            na = _block(entries, (j + 1) * 2 - odd, n, LISTS)
            nb = _block(entries, (j + 1) * 2 - odd + 1, n, LISTS)
            if j > 0:
                mbarrier.wait(v_empty.index(vs), vph)
                _load_values(v_desc, v_full.index(vs), v_buf, vs * PER_V, batch, head_k, bh_k, blocks_k, pa, pb, D, FP8)
                vs += 1
                if vs == STAGES:
                    vs = 0
                    vph ^= 1
            pa = a
            pb = b
            a = na
            b = nb


@gluon.jit
def _first_valid(entries, n, odd, blocks_k, tail, LISTS: gl.constexpr):
    """Valid keys of the two halves of a tile's first stage; the second is empty if the number of blocks is odd."""
    valid_a = gl.where(_block(entries, 0, n, LISTS) == blocks_k - 1, tail, 64)
    valid_a = gl.where(n == 0, 0, valid_a)
    return valid_a, gl.where(odd > 0, 0, 64)


@gluon.jit
def _scores(q, k_ring, ks, zero):
    """Q K^T of one stage, int32, not waited for."""
    return warpgroup_mma(q, k_ring.index(ks).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _make_room(o, acc, alpha, beta, j, D: gl.constexpr, FP8: gl.constexpr):
    """Prepare the sums for the j-th product, j >= 1: rescale the running one, acc, or add it to o in float32.

    alpha: factor of the new maximum on acc. beta: factor on o of all maxima since something was added to it.
    """
    RO: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    if _is_fresh(j, FP8):
        o = o * gl.convert_layout(beta, RO)[:, None] + acc
        beta = alpha
    else:
        acc = rescale(acc, gl.convert_layout(alpha, RO), D)
        beta = beta * alpha
    return o, acc, beta


@gluon.jit
def _is_fresh(j, FP8: gl.constexpr):
    """Whether the j-th product, j >= 1, starts from 0: in e4m3 every second one."""
    if FP8:
        return j % 2 == 1
    else:
        return j < 0


@gluon.jit
def _weigh(p, v_ring, vs, acc, j, FP8: gl.constexpr):
    """P V of one stage, not waited for.

    The tensor core adds up e4m3 products with about 14 bits and cuts the rest off. Over 256 keys that loses 0.2 % where all
    values have one sign, over a whole sequence 10 %.
    """
    if FP8:
        return warpgroup_mma(p, v_ring.index(vs).permute((1, 0)), acc, use_acc=not _is_fresh(j, FP8), is_async=True)
    else:
        return warpgroup_mma(p, v_ring.index(vs), acc, is_async=True)


@gluon.jit
def _consumer(
    o_desc, v_scale_ptr, v_rest_ptr, q_scale_ptr, scale_ptr, shift_ptr, lse_ptr, list_ptr, count_ptr,
    q_buf, k_buf, v_buf, o_buf,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
    n_tiles, tiles, heads, group, blocks_k, width, len_q, tail,
    D: gl.constexpr, STAGES: gl.constexpr, QBUF: gl.constexpr, FP8: gl.constexpr,
    LISTS: gl.constexpr, SHIFT: gl.constexpr, LSE: gl.constexpr, WG: gl.constexpr,
):
    DTYPE: gl.constexpr = o_desc.dtype
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if FP8 else 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 4 if FP8 else 2)
    RS: gl.constexpr = gl.SliceLayout(1, SL)
    RO: gl.constexpr = gl.SliceLayout(1, OL)
    k_ring = k_buf._reinterpret(gl.int8, [STAGES, 128, D], gl.NVMMASharedLayout(D, 8, 2))
    if FP8:
        v_ring = v_buf._reinterpret(gl.float8e4nv, [STAGES, D, 128], gl.NVMMASharedLayout(64, 8, 2))
    else:
        v_ring = v_buf._reinterpret(DTYPE, [STAGES, 128, D], gl.NVMMASharedLayout(128, 16, 2))
    first = gl.program_id(0)
    step = gl.num_programs(0)
    zero = gl.full([64, 128], 0, gl.int32, SL)
    rows = WG * 64 + gl.arange(0, 64, layout=RS)
    none = gl.zeros([64], gl.float32, RS)
    never = n_tiles >> 31

    ks = 0
    kph = 0
    vs = 0
    vph = 0
    qs = 0
    qph = 0

    # First stage of the first tile.
    batch, head, bh_k, place = _place(first, tiles, heads, group)
    n = _kept(count_ptr, batch, head, place, stride_count_b, stride_count_h, blocks_k, LISTS)
    entries = _entries(list_ptr, batch, head, place, stride_list_b, stride_list_h, stride_list_q)
    stages = gl.maximum((n + 1) // 2, 1)
    odd = stages * 2 - n
    valid_a, valid_b = _first_valid(entries, n, odd, blocks_k, tail, LISTS)
    q_scale = gl.load(q_scale_ptr + first.to(gl.int64) * 128 + rows)
    if LISTS:
        scales = scale_ptr + first.to(gl.int64) * width
    else:
        scales = scale_ptr + bh_k.to(gl.int64) * blocks_k
    scale_a = gl.load(scales + _from_end(0, n))
    scale_b = gl.load(scales + _from_end(1 - odd, n))
    mbarrier.wait(q_full.index(qs), qph)
    q = q_buf.index(qs * 2 + WG)
    mbarrier.wait(k_full.index(ks), kph)
    s = warpgroup_mma_wait(0, deps=[_scores(q, k_ring, ks, zero)])
    mbarrier.arrive(k_empty.index(ks))
    if QBUF == 1:
        mbarrier.arrive(q_empty.index(qs), pred=stages == 1)
    ks += 1
    if ks == STAGES:
        ks = 0
        kph ^= 1
    p, m, alpha, l = softmax(s, q_scale, scale_a, scale_b, none, none, valid_a, valid_b, True, SHIFT)
    pb = pack(p, PL, DTYPE, FP8)
    mbarrier.wait(k_full.index(ks), kph, pred=stages > 1)

    for tile in range(first, n_tiles, step):
        # Here m, l, pb belong to stage 0 of this tile, and its stage 1 of K has arrived.
        batch, head, bh_k, place = _place(tile, tiles, heads, group)
        more = tile + step < n_tiles
        next_tile = gl.minimum(tile + step, n_tiles - 1)
        next_batch, next_head, next_bh_k, next_place = _place(next_tile, tiles, heads, group)
        next_n = _kept(count_ptr, next_batch, next_head, next_place, stride_count_b, stride_count_h, blocks_k, LISTS)
        next_entries = _entries(list_ptr, next_batch, next_head, next_place, stride_list_b, stride_list_h, stride_list_q)
        next_stages = gl.maximum((next_n + 1) // 2, 1)
        next_odd = next_stages * 2 - next_n
        next_valid_a, next_valid_b = _first_valid(next_entries, next_n, next_odd, blocks_k, tail, LISTS)
        next_q_scale = gl.load(q_scale_ptr + next_tile.to(gl.int64) * 128 + rows)
        if LISTS:
            next_scales = scale_ptr + next_tile.to(gl.int64) * width
        else:
            next_scales = scale_ptr + next_bh_k.to(gl.int64) * blocks_k
        next_scale_a = gl.load(next_scales + _from_end(0, next_n))
        next_scale_b = gl.load(next_scales + _from_end(1 - next_odd, next_n))
        scale_a = gl.load(scales + _from_end(2 - odd, n))
        scale_b = gl.load(scales + _from_end(3 - odd, n))
        o = gl.zeros([64, D], gl.float32, OL)
        acc = gl.zeros([64, D], gl.float32, OL)
        beta = alpha
        q = q_buf.index(qs * 2 + WG)

        for j in range(1, stages):
            pu = ready(pb, never, PL, FP8)
            s_acc = _scores(q, k_ring, ks, zero)
            o, acc, beta = _make_room(o, acc, alpha, beta, j, D, FP8)
            mbarrier.wait(v_full.index(vs), vph)
            acc = _weigh(pu, v_ring, vs, acc, j, FP8)
            s = warpgroup_mma_wait(1, deps=[s_acc])
            mbarrier.arrive(k_empty.index(ks))
            if QBUF == 1:
                mbarrier.arrive(q_empty.index(qs), pred=j + 1 == stages)
            ks += 1
            if ks == STAGES:
                ks = 0
                kph ^= 1
            na = gl.load(scales + _from_end((j + 1) * 2 - odd, n))
            nb = gl.load(scales + _from_end((j + 1) * 2 - odd + 1, n))
            p, m, alpha_new, l = softmax(s, q_scale, scale_a, scale_b, m, l, 64, 64, False, SHIFT)
            scale_a = na
            scale_b = nb
            # Naming pb_new as a dependency keeps LLVM from sinking the exponentials behind the wait; ptxas would still hoist
            # the wait above them, but it does not schedule across a branch, and waiting here for the next K stage puts one in
            # its way. Without both, the softmax does not overlap the P V product.
            pb_new = pack(p, PL, DTYPE, FP8)
            mbarrier.wait(k_full.index(ks), kph, pred=j + 1 < stages)
            acc, pb, pb_new = warpgroup_mma_wait(0, deps=[acc, pb, pb_new])
            mbarrier.arrive(v_empty.index(vs))
            vs += 1
            if vs == STAGES:
                vs = 0
                vph ^= 1
            pb = pb_new
            alpha = alpha_new

        # The last P V of this tile overlaps the first softmax of the next.
        if QBUF > 1:
            mbarrier.arrive(q_empty.index(qs))
        qs += 1
        if qs == QBUF:
            qs = 0
            qph ^= 1
        m_done = m
        l_done = gl.convert_layout(gl.sum(l, 1), RS)
        n = next_n
        odd = next_odd
        scales = next_scales
        q_scale = next_q_scale
        pu = ready(pb, never, PL, FP8)
        if more:
            mbarrier.wait(q_full.index(qs), qph)
            q = q_buf.index(qs * 2 + WG)
            mbarrier.wait(k_full.index(ks), kph)
            s_acc = _scores(q, k_ring, ks, zero)
            o, acc, beta = _make_room(o, acc, alpha, beta, stages, D, FP8)
            mbarrier.wait(v_full.index(vs), vph)
            acc = _weigh(pu, v_ring, vs, acc, stages, FP8)
            s = warpgroup_mma_wait(1, deps=[s_acc])
            mbarrier.arrive(k_empty.index(ks))
            if QBUF == 1:
                mbarrier.arrive(q_empty.index(qs), pred=next_stages == 1)
            ks += 1
            if ks == STAGES:
                ks = 0
                kph ^= 1
            p, m, alpha, l = softmax(s, next_q_scale, next_scale_a, next_scale_b, m, l, next_valid_a, next_valid_b, True, SHIFT)
            pb_new = pack(p, PL, DTYPE, FP8)
            mbarrier.wait(k_full.index(ks), kph, pred=next_stages > 1)
            acc, pb, pb_new = warpgroup_mma_wait(0, deps=[acc, pb, pb_new])
            pb = pb_new
        else:
            o, acc, beta = _make_room(o, acc, alpha, beta, stages, D, FP8)
            mbarrier.wait(v_full.index(vs), vph)
            acc = _weigh(pu, v_ring, vs, acc, stages, FP8)
            acc, pb = warpgroup_mma_wait(0, deps=[acc, pb])
        mbarrier.arrive(v_empty.index(vs))
        vs += 1
        if vs == STAGES:
            vs = 0
            vph ^= 1
        stages = next_stages
        if FP8:
            o = o * gl.convert_layout(beta, RO)[:, None] + acc
        else:
            o = acc
        is_empty = l_done == 0.0
        l_done = gl.where(is_empty, 1.0, l_done)
        o = o * gl.convert_layout(gl.where(is_empty, 0.0, 1.0 / l_done), RO)[:, None]
        if FP8:
            at_d = bh_k.to(gl.int64) * D + gl.arange(0, D, layout=gl.SliceLayout(0, OL))
            is_filled = gl.convert_layout(gl.where(is_empty, 0.0, 1.0), RO)
            o = o * gl.load(v_scale_ptr + at_d)[None, :] + gl.load(v_rest_ptr + at_d)[None, :] * is_filled[:, None]
        o_s = o_buf.index(WG)
        tma.store_wait(0)
        o_s._reinterpret(DTYPE, [64, D], gl.NVMMASharedLayout(128, 16, 2)).store(o.to(DTYPE))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch, head, place * 128 + WG * 64, 0], o_s)
        if LSE:
            at = place * 128 + rows
            base = (batch.to(gl.int64) * heads + head) * len_q
            shift = gl.load(shift_ptr + base + at, mask=at < len_q, other=0.0)
            lse = (m_done - SHIFT + gl.log2(l_done)) * 0.6931471805599453 + shift
            gl.store(lse_ptr + base + at, gl.where(is_empty, float("-inf"), lse), mask=at < len_q)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["stride_list_b", "stride_list_h", "stride_list_q", "stride_count_b", "stride_count_h",
                              "n_tiles", "tiles", "heads", "group", "blocks_k", "width", "len_q", "tail"])
def _sage_hopper_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, v_scale_ptr, v_rest_ptr, q_scale_ptr, scale_ptr, shift_ptr, lse_ptr, list_ptr, count_ptr,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
    n_tiles, tiles, heads, group, blocks_k, width, len_q, tail,
    D: gl.constexpr, STAGES: gl.constexpr, QBUF: gl.constexpr, FP8: gl.constexpr,
    LISTS: gl.constexpr, SHIFT: gl.constexpr, LSE: gl.constexpr, CREGS: gl.constexpr, num_warps: gl.constexpr,
):
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    KSH: gl.constexpr = gl.NVMMASharedLayout(D, 8, 2)
    HALF: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    o_buf = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, 64, D], HALF)
    q_buf = gl.allocate_shared_memory(gl.int8, [QBUF * 2, 64, D], KSH)
    k_buf = gl.allocate_shared_memory(gl.int8, [STAGES * 2, 64, D], KSH)
    if FP8:
        v_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, D, 64], gl.NVMMASharedLayout(64, 8, 2))
    else:
        v_buf = gl.allocate_shared_memory(v_desc.dtype, [STAGES * 2 * (D // 64), 1, 1, 64, 64], HALF)
    q_full = gl.allocate_shared_memory(gl.int64, [QBUF, 1], BL)
    q_empty = gl.allocate_shared_memory(gl.int64, [QBUF, 1], BL)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    for i in gl.static_range(QBUF):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    gl.warp_specialize([
        (_consumer, (o_desc, v_scale_ptr, v_rest_ptr, q_scale_ptr, scale_ptr, shift_ptr, lse_ptr, list_ptr, count_ptr,
                     q_buf, k_buf, v_buf, o_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                     stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                     n_tiles, tiles, heads, group, blocks_k, width, len_q, tail,
                     D, STAGES, QBUF, FP8, LISTS, SHIFT, LSE, 0)),
        (_consumer, (o_desc, v_scale_ptr, v_rest_ptr, q_scale_ptr, scale_ptr, shift_ptr, lse_ptr, list_ptr, count_ptr,
                     q_buf, k_buf, v_buf, o_buf, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                     stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                     n_tiles, tiles, heads, group, blocks_k, width, len_q, tail,
                     D, STAGES, QBUF, FP8, LISTS, SHIFT, LSE, 1)),
        (_producer, (q_desc, k_desc, v_desc, list_ptr, count_ptr, q_buf, k_buf, v_buf,
                     q_full, q_empty, k_full, k_empty, v_full, v_empty,
                     stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                     n_tiles, tiles, heads, group, blocks_k, D, STAGES, QBUF, FP8, LISTS)),
    ], [4, 1], [CREGS, 24])


def _rows_descriptor(x, rows: int) -> TensorDescriptor:
    """TMA descriptor of an 8-bit tensor seen as [rows, last dimension], with boxes of whole rows."""
    columns = x.shape[-1]
    shape, box = [x.numel() // columns, columns], [rows, columns]
    return TensorDescriptor(x.view(-1, columns), shape, [columns, 1], box, gl.NVMMASharedLayout(columns, 8, 2))


def _half_descriptor(x, columns: int) -> TensorDescriptor:
    """TMA descriptor of x [B, S, H, D], seen as [B, H, S, D], with boxes of 64 rows."""
    strides = [x.shape[3] if x.shape[i] == 1 else x.stride(i) for i in (0, 2, 1)] + [1]
    shape = [x.shape[0], x.shape[2], x.shape[1], x.shape[3]]
    return TensorDescriptor(x, shape, strides, [1, 1, 64, columns], gl.NVMMASharedLayout(128, 16, 4))


def launch_hopper_forward(
    quantised: QuantisedTensors, v, out, lse, *, blocks=None, counts=None, even_rows: bool = True,
    config: HopperConfig | None = None, multiprocessors: int | None = None,
):
    """Fill out [B, S_q, H, D] and lse [B, H, S_q], both contiguous; lse None = not wanted. See `kernels.hopper_reasons`.

    v: [B, S_k, H_kv, D], read where there are no 8-bit values. blocks, counts: int32 lists for tiles of 128 queries, or None.
    even_rows: whether all counts are about equal. multiprocessors: programs of the persistent grid; None = the card's.
    """
    batch, len_q, heads, _ = out.shape
    heads_k, blocks_k = quantised.k_scale.shape[1:]
    d_pad, fp8 = quantised.q8.shape[3], quantised.v8 is not None
    config = config or hopper_config(fp8)
    tiles = quantised.q8.shape[2] // 128
    n_tiles = batch * heads * tiles
    programs = n_tiles
    if config.is_persistent and even_rows:
        count = multiprocessors or torch.cuda.get_device_properties(out.device).multi_processor_count
        programs = min(count, n_tiles)
    strides, scales, width = (0,) * 5, quantised.k_scale, 0
    if blocks is not None:
        scales, width = launch_list_scales(blocks, quantised.k_scale, heads), blocks.shape[3]
        strides = (*broadcast_strides(blocks), blocks.stride(2), *broadcast_strides(counts))
    len_k = v.shape[1]
    return _sage_hopper_fwd_kernel[(programs,)](
        _rows_descriptor(quantised.q8, 64), _rows_descriptor(quantised.k8, 64),
        _rows_descriptor(quantised.v8, d_pad) if fp8 else _half_descriptor(v, 64), _half_descriptor(out, d_pad),
        quantised.v_scale if fp8 else quantised.k_scale, quantised.v_rest if fp8 else quantised.k_scale, quantised.q_scale,
        scales, out if lse is None else quantised.lse_shift, out if lse is None else lse,
        quantised.q_scale if blocks is None else blocks, quantised.q_scale if counts is None else counts,
        *strides, n_tiles, tiles, heads, heads // heads_k, blocks_k, width, len_q, len_k - (blocks_k - 1) * 64,
        D=d_pad, STAGES=config.stages, QBUF=config.query_buffers,
        FP8=fp8, LISTS=blocks is not None, SHIFT=P_SHIFT if fp8 else 0.0, LSE=lse is not None, CREGS=CONSUMER_REGISTERS,
        num_warps=4,
    )
