"""dQ of block-sparse attention for Hopper, warp-specialised, in Gluon.

A CTA owns 128 query rows, 64 for each consumer, and walks their list PAIR sub-blocks of 64 keys at a time; with SPLIT each consumer
owns a 64-row tile with a list, ring and producer of its own. S = Q K^T and dP = dO V^T are issued together, and the exponentials
run under the second; the two consumers cover each other's gaps. dK and dV are faster in plain Triton (see `backward`).
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnmux_blocksparse.kernels.arguments import LOG2_E, IndexTensors, index_arguments
from attnmux_blocksparse.kernels.configs import HOPPER_DQ
from attnmux_blocksparse.kernels.hopper_loads import (
    CONSUMER_REGISTERS,
    clear_padding,
    describe,
    last_block_tokens,
    load_box,
    load_stage,
    place_in_raster,
    place_of,
    sub_block,
    valid_keys,
)


@gluon.jit
def _dq_producer(
    q_desc, k_desc, v_desc, do_desc, list_ptr, count_ptr, q_s, do_s, k_buf, v_buf,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, n_tiles, n_tiles_head, n_heads, len_q, len_k,
    GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, PAIR: gl.constexpr, STAGES: gl.constexpr,
    D: gl.constexpr, WG: gl.constexpr, SPLIT: gl.constexpr,
):
    PANELS: gl.constexpr = D // 64
    HALVES: gl.constexpr = 1 if SPLIT else 2
    first = gl.program_id(0)
    step = gl.num_programs(0)
    if SPLIT:
        first = first * 2 + WG
        step = step * 2
    slot = 0
    phase = 1
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
        mbarrier.wait(q_empty, qph)
        qph ^= 1
        mbarrier.expect(q_full, 2 * HALVES * 64 * D * 2)
        for w in gl.static_range(HALVES):
            load_box(q_desc, q_full, q_s, w, batch, head, row + w * 64, 0, len_q, BLOCK_Q)
            load_box(do_desc, q_full, do_s, w, batch, head, row + w * 64, 0, len_q, BLOCK_Q)
        for j in range((n + PAIR - 1) // PAIR):
            _, a = sub_block(blocks, j * PAIR, n, BLOCK_K)
            _, b = sub_block(blocks, j * PAIR + PAIR - 1, n, BLOCK_K)
            mbarrier.wait(k_empty.index(slot), phase)
            load_stage(k_desc, k_full.index(slot), k_buf, slot * PANELS * PAIR, batch, head_k, a, b, len_k, BLOCK_K, PAIR, PANELS)
            mbarrier.wait(v_empty.index(slot), phase)
            load_stage(v_desc, v_full.index(slot), v_buf, slot * PANELS * PAIR, batch, head_k, a, b, len_k, BLOCK_K, PAIR, PANELS)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _dq_consumer(
    q_desc, dq_ptr, lse2_ptr, delta_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, q_s, do_s, k_buf, v_buf,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, stride_dq_b, stride_dq_s, stride_dq_h,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
    n_tiles, n_tiles_head, n_heads, len_q, len_k, len_pad, scale2, scale,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, PAIR: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    WG: gl.constexpr, SPLIT: gl.constexpr, HAS_Q_LEN: gl.constexpr, HAS_K_LEN: gl.constexpr, MASK_K: gl.constexpr,
    CLEAR: gl.constexpr,
):
    DTYPE: gl.constexpr = q_desc.dtype
    BN: gl.constexpr = 64 * PAIR
    PANELS: gl.constexpr = D // 64
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PL: gl.constexpr = gl.DotOperandLayout(0, OL, 2)
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    HALVES: gl.constexpr = 1 if SPLIT else 2
    HALF: gl.constexpr = 0 if SPLIT else WG
    k_ring = k_buf._reinterpret(DTYPE, [STAGES, BN, D], SH)
    v_ring = v_buf._reinterpret(DTYPE, [STAGES, BN, D], SH)
    q = q_s._reinterpret(DTYPE, [HALVES, 64, D], SH).index(HALF)
    do = do_s._reinterpret(DTYPE, [HALVES, 64, D], SH).index(HALF)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, SL))
    cols = gl.arange(0, BN, layout=gl.SliceLayout(0, SL))
    zero = gl.zeros([64, BN], gl.float32, SL)
    first = gl.program_id(0)
    step = gl.num_programs(0)
    if SPLIT:
        first = first * 2 + WG
        step = step * 2
    slot = 0
    phase = 0
    qph = 0
    for tile in range(first, n_tiles, step):
        batch, head, place = place_of(tile, n_tiles_head, n_heads)
        row = place * (64 * HALVES) + HALF * 64
        block_q = row // BLOCK_Q
        n = gl.load(count_ptr + batch.to(gl.int64) * stride_count_b + head.to(gl.int64) * stride_count_h + block_q)
        n *= BLOCK_K // 64
        blocks = (list_ptr + batch.to(gl.int64) * stride_list_b + head.to(gl.int64) * stride_list_h
                  + block_q.to(gl.int64) * stride_list_q)
        k_len = k_len_ptr + batch.to(gl.int64) * stride_klen_b
        end_last = len_k
        if MASK_K and not HAS_K_LEN:
            end_last = last_block_tokens(blocks, n, len_k, BLOCK_K)
        stats = (batch.to(gl.int64) * n_heads + head) * len_pad + row + rows
        lse2 = gl.load(lse2_ptr + stats)
        delta = gl.load(delta_ptr + stats)
        dq = gl.zeros([64, D], gl.float32, OL)
        mbarrier.wait(q_full, qph)
        qph ^= 1
        for j in range((n + PAIR - 1) // PAIR):
            if MASK_K:
                valid_a = valid_keys(blocks, j * PAIR, n, end_last, k_len, len_k, BLOCK_K, HAS_K_LEN)
                valid_b = valid_a
                if PAIR == 2:
                    valid_b = valid_keys(blocks, j * PAIR + 1, n, end_last, k_len, len_k, BLOCK_K, HAS_K_LEN)
            mbarrier.wait(k_full.index(slot), phase)
            s_acc = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            dp_acc = warpgroup_mma(do, v_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_acc])
            p = gl.exp2(s * scale2 - lse2[:, None])
            if PAIR == 2:
                if (j + 1) * 2 > n:
                    p = gl.where((cols < 64)[None, :], p, 0.0)
            dp, p = warpgroup_mma_wait(0, deps=[dp_acc, p])
            mbarrier.arrive(v_empty.index(slot))
            ds = p * (dp - delta[:, None])
            if MASK_K:
                if (valid_a < 64) | (valid_b < 64):
                    # Replaced, not multiplied: scores of padding may be NaN.
                    keep = (cols < valid_a) | ((cols >= 64) & (cols < 64 + valid_b))
                    keep = keep & ((cols < valid_a) | (cols >= 64))
                    ds = gl.where(keep[None, :], ds, 0.0)
                    if CLEAR:
                        clear_padding(k_buf, slot * PANELS * PAIR, valid_a, valid_b, DTYPE, PAIR, PANELS)
            da = gl.convert_layout(ds.to(DTYPE), PL)
            dq_acc = warpgroup_mma(da, k_ring.index(slot), dq, is_async=True)
            dq, da = warpgroup_mma_wait(0, deps=[dq_acc, da])
            mbarrier.arrive(k_empty.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        mbarrier.arrive(q_empty)
        end_q = gl.minimum((block_q + 1) * BLOCK_Q, len_q)
        if HAS_Q_LEN:
            length = gl.load(q_len_ptr + batch.to(gl.int64) * stride_qlen_b + block_q)
            end_q = gl.minimum(block_q * BLOCK_Q + length, end_q)
        i = gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
        r = row + i
        c = gl.arange(0, D, layout=gl.SliceLayout(0, OL))
        # Empty rows have p = 0, but q and dO beyond a valid length may hold NaN.
        dq = gl.where((r < end_q)[:, None], dq * scale, 0.0).to(DTYPE)
        base = dq_ptr + batch.to(gl.int64) * stride_dq_b + head.to(gl.int64) * stride_dq_h
        token = r
        if len(q_desc.block_shape) == 5:
            frame, line, place = place_in_raster(q_desc, 0, row, len_q, BLOCK_Q)
            lines: gl.constexpr = q_desc.block_shape[1]
            columns: gl.constexpr = q_desc.block_shape[2]
            token = frame + i // (lines * columns)
            token = token * q_desc.shape[1] + line + i // columns % lines
            token = token * q_desc.shape[2] + place + i % columns
        gl.store(base + token.to(gl.int64)[:, None] * stride_dq_s + c[None, :], dq, mask=(r < len_q)[:, None])


@gluon.jit
def _dq_ring(DTYPE: gl.constexpr, STAGES: gl.constexpr, PAIR: gl.constexpr, D: gl.constexpr, HALVES: gl.constexpr):
    """Shared memory and barriers of one producer."""
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    BL: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(DTYPE, [HALVES, 1, 1, 64, D], SH)
    do = gl.allocate_shared_memory(DTYPE, [HALVES, 1, 1, 64, D], SH)
    k = gl.allocate_shared_memory(DTYPE, [STAGES * PAIR * (D // 64), 1, 1, 64, 64], SH)
    v = gl.allocate_shared_memory(DTYPE, [STAGES * PAIR * (D // 64), 1, 1, 64, 64], SH)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BL)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BL)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BL)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=HALVES)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=HALVES)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=HALVES)
    return q, do, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty


@gluon.jit(do_not_specialize=["stride_list_b", "stride_list_h", "stride_list_q", "stride_count_b", "stride_count_h",
                              "stride_qlen_b", "stride_klen_b", "n_tiles", "n_tiles_head", "n_heads", "len_q", "len_k", "len_pad"])
def _blocksparse_hopper_bwd_dq_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_ptr, lse2_ptr, delta_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr,
    stride_dq_b, stride_dq_s, stride_dq_h,
    stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b, stride_klen_b,
    n_tiles, n_tiles_head, n_heads, len_q, len_k, len_pad, scale2, scale,
    GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr, PAIR: gl.constexpr,
    STAGES: gl.constexpr, SPLIT: gl.constexpr, HAS_Q_LEN: gl.constexpr, HAS_K_LEN: gl.constexpr, MASK_K: gl.constexpr,
    CLEAR: gl.constexpr, CREGS: gl.constexpr, num_warps: gl.constexpr,
):
    qa, da, ka, va, qfa, qea, kfa, kea, vfa, vea = _dq_ring(q_desc.dtype, STAGES, PAIR, D, 1 if SPLIT else 2)
    if SPLIT:
        qc, dc, kc, vc, qfc, qec, kfc, kec, vfc, vec = _dq_ring(q_desc.dtype, STAGES, PAIR, D, 1)
        gl.warp_specialize([
            (_dq_consumer, (q_desc, dq_ptr, lse2_ptr, delta_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, qa, da, ka, va,
                            qfa, qea, kfa, kea, vfa, vea, stride_dq_b, stride_dq_s, stride_dq_h,
                            stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b,
                            stride_klen_b, n_tiles, n_tiles_head, n_heads, len_q, len_k, len_pad, scale2, scale,
                            BLOCK_Q, BLOCK_K, PAIR, STAGES, D, 0, SPLIT, HAS_Q_LEN, HAS_K_LEN, MASK_K, CLEAR)),
            (_dq_consumer, (q_desc, dq_ptr, lse2_ptr, delta_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, qc, dc, kc, vc,
                            qfc, qec, kfc, kec, vfc, vec, stride_dq_b, stride_dq_s, stride_dq_h,
                            stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b,
                            stride_klen_b, n_tiles, n_tiles_head, n_heads, len_q, len_k, len_pad, scale2, scale,
                            BLOCK_Q, BLOCK_K, PAIR, STAGES, D, 1, SPLIT, HAS_Q_LEN, HAS_K_LEN, MASK_K, CLEAR)),
            (_dq_producer, (q_desc, k_desc, v_desc, do_desc, list_ptr, count_ptr, qa, da, ka, va, qfa, qea, kfa, kea, vfa, vea,
                            stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                            n_tiles, n_tiles_head, n_heads, len_q, len_k, GROUP, BLOCK_Q, BLOCK_K, PAIR, STAGES, D, 0, SPLIT)),
            (_dq_producer, (q_desc, k_desc, v_desc, do_desc, list_ptr, count_ptr, qc, dc, kc, vc, qfc, qec, kfc, kec, vfc, vec,
                            stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                            n_tiles, n_tiles_head, n_heads, len_q, len_k, GROUP, BLOCK_Q, BLOCK_K, PAIR, STAGES, D, 1, SPLIT)),
        ], [4, 1, 1], [CREGS, 24, 24])
    else:
        gl.warp_specialize([
            (_dq_consumer, (q_desc, dq_ptr, lse2_ptr, delta_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, qa, da, ka, va,
                            qfa, qea, kfa, kea, vfa, vea, stride_dq_b, stride_dq_s, stride_dq_h,
                            stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b,
                            stride_klen_b, n_tiles, n_tiles_head, n_heads, len_q, len_k, len_pad, scale2, scale,
                            BLOCK_Q, BLOCK_K, PAIR, STAGES, D, 0, SPLIT, HAS_Q_LEN, HAS_K_LEN, MASK_K, CLEAR)),
            (_dq_consumer, (q_desc, dq_ptr, lse2_ptr, delta_ptr, list_ptr, count_ptr, q_len_ptr, k_len_ptr, qa, da, ka, va,
                            qfa, qea, kfa, kea, vfa, vea, stride_dq_b, stride_dq_s, stride_dq_h,
                            stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h, stride_qlen_b,
                            stride_klen_b, n_tiles, n_tiles_head, n_heads, len_q, len_k, len_pad, scale2, scale,
                            BLOCK_Q, BLOCK_K, PAIR, STAGES, D, 1, SPLIT, HAS_Q_LEN, HAS_K_LEN, MASK_K, CLEAR)),
            (_dq_producer, (q_desc, k_desc, v_desc, do_desc, list_ptr, count_ptr, qa, da, ka, va, qfa, qea, kfa, kea, vfa, vea,
                            stride_list_b, stride_list_h, stride_list_q, stride_count_b, stride_count_h,
                            n_tiles, n_tiles_head, n_heads, len_q, len_k, GROUP, BLOCK_Q, BLOCK_K, PAIR, STAGES, D, 0, SPLIT)),
        ], [4, 1], [CREGS, 24])


def launch_hopper_dq(
    q, k, v, dout, lse2, delta, dq, index: IndexTensors, *, softmax_scale: float, config=None
):
    """Fill dq [B, S_q, H, D]; lse2 and delta as `backward.launch_stats` makes them."""
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1], k.shape[2]
    config = config or HOPPER_DQ[head_dim, min(index.block_q, 128)]
    n_tiles_head = -(-len_q // (64 if config.split else 128))
    n_tiles = batch * heads * n_tiles_head
    # One program a tile: 1 to 3 % faster than a persistent grid on even lists, 15 % on uneven ones.
    programs = max(n_tiles // 2, 1) if config.split else n_tiles
    list_arguments = index_arguments(index)
    return _blocksparse_hopper_bwd_dq_kernel[(programs,)](
        describe(q, 64, head_dim, index.raster), describe(k, 64, 64, index.raster), describe(v, 64, 64, index.raster),
        describe(dout, 64, head_dim, index.raster),
        dq, lse2, delta, *list_arguments, *dq.stride()[:3],
        *index.list_strides(), *index.count_strides(), index.length_stride("q"), index.length_stride("k"),
        n_tiles, n_tiles_head, heads, len_q, len_k, lse2.shape[2], softmax_scale * LOG2_E, softmax_scale,
        GROUP=heads // heads_k, BLOCK_Q=index.block_q, BLOCK_K=index.block_k, D=head_dim, PAIR=config.pair,
        STAGES=config.stages, SPLIT=config.split, HAS_Q_LEN=index.q_lengths is not None,
        HAS_K_LEN=index.k_lengths is not None, MASK_K=index.k_lengths is not None or len_k % index.block_k != 0,
        CLEAR=not index.streams_whole_rows("k"), CREGS=CONSUMER_REGISTERS, num_warps=4,
    )
