"""The linear branch in plain Triton: one pass over k and v, one over q and the output; two more backward.

The state of a head is S = phi(K)^T V and z = phi(K)^T 1. What is kept is N = diag(1 / z) S W^T, and a query takes the share
c = phi(q) z / (phi(q) . z + eps) of every feature, so the branch is c N; `reference` has the formulas. Partial states
of a program each are added up in a fixed order: no atomics.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import triton
import triton.language as tl

from attnmux_blocksparse.kernels.forward import load_tile, store_tile


@triton.jit
def apply_feature_map(x, D: tl.constexpr, D_PAD: tl.constexpr, FEATURE_MAP: tl.constexpr, SCALE: tl.constexpr = 1):
    """Phi of rows x [ROWS, D_PAD] in float32, times SCALE for softmax; zeros in the padding of D."""
    offs_d = tl.arange(0, D_PAD)
    if FEATURE_MAP == "softmax":
        if D_PAD != D:
            x = tl.where((offs_d < D)[None, :], x, float("-inf"))
        # exp2 and one division a row: both exp and a quotient are several instructions each.
        phi = tl.exp2((x - tl.max(x, 1)[:, None]) * 1.4426950408889634)
        phi = phi * (SCALE / tl.sum(phi, 1))[:, None]
    elif FEATURE_MAP == "elu":
        phi = tl.where(x <= 0, tl.exp(tl.minimum(x, 0.0)), x + 1.0)
    else:
        phi = tl.where(x <= 0, 0.0, x)
    if D_PAD != D:
        phi = tl.where((offs_d < D)[None, :], phi, 0.0)
    return phi


@triton.jit
def through_feature_map(grad, x, phi, FEATURE_MAP: tl.constexpr):
    """Gradient of x from that of phi(x); softmax has its own form, in which phi and grad come multiplied."""
    if FEATURE_MAP == "elu":
        return grad * tl.where(x <= 0, phi, 1.0)
    return tl.where(x <= 0, 0.0, grad)


@triton.jit(do_not_specialize=["n_heads", "n_pairs", "length", "n_blocks"])
def _sla_pool_kernel(
    x_ptr, pooled_ptr, stride_b, stride_s, stride_h, n_heads, n_pairs, length, n_blocks,
    BLOCK: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    # Heads side by side: programs in flight read whole tokens, which lie together.
    pair = tl.program_id(0) % n_pairs
    block = tl.program_id(0) // n_pairs
    batch = pair // n_heads
    head = pair % n_heads
    offs_d = tl.arange(0, D_PAD)
    total = tl.zeros([D_PAD], tl.float32)
    for sub in tl.static_range(BLOCK // TILE):
        row = block * BLOCK + sub * TILE
        x = load_tile(None, x_ptr, batch, head, row, length, stride_b, stride_s, stride_h, TILE, D, D_PAD, False)
        total += tl.sum(x.to(tl.float32), 0)
    size = tl.minimum(BLOCK, length - block * BLOCK)
    at = (pair.to(tl.int64) * n_blocks + block) * D + offs_d
    tl.store(pooled_ptr + at, total / size.to(tl.float32), mask=offs_d < D)


@triton.jit(do_not_specialize=["n_heads", "n_pairs", "length", "n_blocks", "n_splits", "blocks_per_split"])
def _sla_summarize_kernel(
    k_ptr, v_ptr, pooled_ptr, part_ptr, part_mass_ptr, part_range_ptr,
    stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    n_heads, n_pairs, length, n_blocks, n_splits, blocks_per_split,
    BLOCK: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, FEATURE_MAP: tl.constexpr,
    PHI_SCALE: tl.constexpr, RANGE: tl.constexpr, STAGES: tl.constexpr,
):
    pair = tl.program_id(0) % n_pairs
    split = tl.program_id(0) // n_pairs
    batch = pair // n_heads
    head = pair % n_heads
    offs_d = tl.arange(0, D_PAD)
    offs_r = tl.arange(0, TILE)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, n_blocks)
    state = tl.zeros([D_PAD, D_PAD], tl.float32)
    # Rows that a thread holds several of are joined at once.
    mass = tl.zeros([16, D_PAD], tl.float32)
    if RANGE:
        highest = tl.full([16, D_PAD], float("-inf"), tl.float32)
        lowest = tl.full([16, D_PAD], float("inf"), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        total = tl.zeros([D_PAD], tl.float32)
        for sub in tl.static_range(BLOCK // TILE):
            row = block * BLOCK + sub * TILE
            k = load_tile(None, k_ptr, batch, head, row, length, stride_k_b, stride_k_s, stride_k_h, TILE, D, D_PAD, False)
            v = load_tile(None, v_ptr, batch, head, row, length, stride_v_b, stride_v_s, stride_v_h, TILE, D, D_PAD, False)
            x = k.to(tl.float32)
            total += tl.sum(x, 0)
            phi = apply_feature_map(x, D, D_PAD, FEATURE_MAP, PHI_SCALE)
            is_row = (row + offs_r < length)[:, None]
            phi = tl.where(is_row, phi, 0.0)
            mass += tl.sum(phi.reshape(TILE // 16, 16, D_PAD), 0)
            if RANGE:
                v_ = v.to(tl.float32)
                high, low = tl.where(is_row, v_, float("-inf")), tl.where(is_row, v_, float("inf"))
                highest = tl.maximum(highest, tl.max(high.reshape(TILE // 16, 16, D_PAD), 0))
                lowest = tl.minimum(lowest, tl.min(low.reshape(TILE // 16, 16, D_PAD), 0))
            state = tl.dot(phi.to(v.dtype).T, v, state)
        size = tl.minimum(BLOCK, length - block * BLOCK)
        at = (pair.to(tl.int64) * n_blocks + block) * D + offs_d
        tl.store(pooled_ptr + at, total / size.to(tl.float32), mask=offs_d < D)
    slot = pair.to(tl.int64) * n_splits + split
    tile = offs_d[:, None] * D_PAD + offs_d[None, :]
    tl.store(part_ptr + slot * D_PAD * D_PAD + tile, state * (1.0 / PHI_SCALE))
    tl.store(part_mass_ptr + slot * D_PAD + offs_d, tl.sum(mass, 0) * (1.0 / PHI_SCALE))
    if RANGE:
        tl.store(part_range_ptr + slot * 2 * D_PAD + offs_d, tl.max(highest, 0))
        tl.store(part_range_ptr + (slot * 2 + 1) * D_PAD + offs_d, tl.min(lowest, 0))


@triton.jit(do_not_specialize=["n_parts"])
def _sla_reduce_kernel(
    part_ptr, part_mass_ptr, part_range_ptr, state_ptr, mass_ptr, range_ptr, n_parts,
    ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, RANGE: tl.constexpr,
):
    """Add up the partial states [n_parts, D_PAD, D_PAD] and masses [n_parts, D_PAD] of a head, some rows a program.

    The first program of a head also takes the extremes over the partial ones [n_parts, 2, D_PAD].
    """
    pair = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, PARTS)
    offs_d = tl.arange(0, D_PAD)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    state = tl.zeros([ROWS, D_PAD], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for start in range(0, n_parts, PARTS):
        slot = pair * n_parts + start + offs_p
        is_part = start + offs_p < n_parts
        at = (slot[:, None, None] * D_PAD + rows[None, :, None]) * D_PAD + offs_d[None, None, :]
        state += tl.sum(tl.load(part_ptr + at, mask=is_part[:, None, None], other=0.0), 0)
        at = slot[:, None] * D_PAD + rows[None, :]
        mass += tl.sum(tl.load(part_mass_ptr + at, mask=is_part[:, None], other=0.0), 0)
    at = (pair * D + rows[:, None]) * D + offs_d[None, :]
    tl.store(state_ptr + at, state, mask=(rows < D)[:, None] & (offs_d < D)[None, :])
    tl.store(mass_ptr + pair * D + rows, mass, mask=rows < D)
    if RANGE:
        if tl.program_id(1) == 0:
            highest = tl.full([D_PAD], float("-inf"), tl.float32)
            lowest = tl.full([D_PAD], float("inf"), tl.float32)
            for begin in range(0, n_parts, PARTS):
                is_in = (begin + offs_p < n_parts)[:, None]
                of_part = part_range_ptr + (pair * n_parts + begin + offs_p)[:, None] * 2 * D_PAD + offs_d[None, :]
                highest = tl.maximum(highest, tl.max(tl.load(of_part, mask=is_in, other=float("-inf")), 0))
                lowest = tl.minimum(lowest, tl.min(tl.load(of_part + D_PAD, mask=is_in, other=float("inf")), 0))
            tl.store(range_ptr + pair * 2 * D + offs_d, highest, mask=offs_d < D)
            tl.store(range_ptr + (pair * 2 + 1) * D + offs_d, lowest, mask=offs_d < D)


@triton.jit
def _sla_project_kernel(
    x_ptr, mass_ptr, weight_ptr, out_ptr, stride_in, stride_out, scale,
    ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    HAS_MASS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):
    """Rows of x [D, D] of a head, times a matrix M[in, out] where there is one, over their mass where given, times scale."""
    pair = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, D_PAD)
    base = x_ptr + (pair * D + rows[:, None]) * D
    is_row = (rows < D)[:, None]
    if HAS_WEIGHT:
        acc = tl.zeros([ROWS, D_PAD], tl.float32)
        for start in range(0, D, STEP):
            offs_i = start + tl.arange(0, STEP)
            x = tl.load(base + offs_i[None, :], mask=is_row & (offs_i < D)[None, :], other=0.0)
            at = weight_ptr + offs_i[:, None] * stride_in + offs_d[None, :] * stride_out
            w = tl.load(at, mask=(offs_i < D)[:, None] & (offs_d < D)[None, :], other=0.0)
            acc = tl.dot(x, w.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.load(base + offs_d[None, :], mask=is_row & (offs_d < D)[None, :], other=0.0)
    if HAS_MASS:
        mass = tl.load(mass_ptr + pair * D + rows, mask=rows < D, other=0.0)
        # A feature that no key has.
        acc = tl.where((mass == 0.0)[:, None], 0.0, acc / mass[:, None])
    at = out_ptr + (pair * D_PAD + rows[:, None]) * D_PAD + offs_d[None, :]
    tl.store(at, (acc * scale).to(out_ptr.dtype.element_ty))


@triton.jit
def _sla_weight_grad_kernel(
    gathered_ptr, state_ptr, mass_ptr, part_ptr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    """A^T diag(1 / z) S of a head, some columns a program."""
    pair = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offs_d = tl.arange(0, D_PAD)
    acc = tl.zeros([D_PAD, COLUMNS], tl.float32)
    for start in range(0, D, STEP):
        offs_i = start + tl.arange(0, STEP)
        is_feature = offs_i < D
        mass = tl.load(mass_ptr + pair * D + offs_i, mask=is_feature, other=0.0)
        at = (pair * D + offs_i[None, :]) * D + offs_d[:, None]
        gathered = tl.load(gathered_ptr + at, mask=is_feature[None, :] & (offs_d < D)[:, None], other=0.0)
        at = (pair * D + offs_i[:, None]) * D + columns[None, :]
        state = tl.load(state_ptr + at, mask=is_feature[:, None] & (columns < D)[None, :], other=0.0)
        state = tl.where((mass == 0.0)[:, None], 0.0, state / mass[:, None])
        acc = tl.dot(gathered, state, acc, input_precision="ieee")
    at = (pair * D + offs_d[:, None]) * D + columns[None, :]
    tl.store(part_ptr + at, acc, mask=(offs_d < D)[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["n_heads", "n_pairs", "len_q"])
def _sla_finish_kernel(
    q_ptr, sparse_ptr, out_ptr, folded_ptr, mass_ptr, bias_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_sparse_b, stride_sparse_s, stride_sparse_h,
    stride_out_b, stride_out_s, stride_out_h, n_heads, n_pairs, len_q, eps,
    GROUP: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, FEATURE_MAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    pair = tl.program_id(0) % n_pairs
    row = (tl.program_id(0) // n_pairs) * TILE
    batch = pair // n_heads
    head = pair % n_heads
    offs_d = tl.arange(0, D_PAD)
    pair_k = (pair // GROUP).to(tl.int64)
    mass = tl.load(mass_ptr + pair_k * D + offs_d, mask=offs_d < D, other=0.0)
    folded = tl.load(folded_ptr + (pair_k * D_PAD + offs_d[:, None]) * D_PAD + offs_d[None, :])
    q = load_tile(None, q_ptr, batch, head, row, len_q, stride_q_b, stride_q_s, stride_q_h, TILE, D, D_PAD, False)
    sparse = load_tile(None, sparse_ptr, batch, head, row, len_q, stride_sparse_b, stride_sparse_s, stride_sparse_h,
                       TILE, D, D_PAD, False)
    share = apply_feature_map(q.to(tl.float32), D, D_PAD, FEATURE_MAP) * mass[None, :]
    share = share * (1.0 / (tl.sum(share, 1) + eps))[:, None]
    out = tl.dot(share.to(q.dtype), folded) + sparse.to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
    store_tile(out_ptr, out, batch, head, row, len_q, stride_out_b, stride_out_s, stride_out_h, TILE, D, D_PAD)


@triton.jit(do_not_specialize=["n_heads", "n_pairs", "len_q", "n_splits", "tiles_per_split"])
def _sla_bwd_q_kernel(
    q_ptr, dout_ptr, dq_ptr, folded_ptr, mass_ptr, part_ptr, part_taken_ptr, part_bias_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_do_b, stride_do_s, stride_do_h, stride_dq_b, stride_dq_s, stride_dq_h,
    n_heads, n_pairs, len_q, n_splits, tiles_per_split, eps,
    GROUP: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, FEATURE_MAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds to dq, and writes the parts of A = c^T dO, u = c^T r and of the bias gradient."""
    pair = tl.program_id(0) % n_pairs
    split = tl.program_id(0) // n_pairs
    batch = pair // n_heads
    head = pair % n_heads
    offs_d = tl.arange(0, D_PAD)
    pair_k = (pair // GROUP).to(tl.int64)
    mass = tl.load(mass_ptr + pair_k * D + offs_d, mask=offs_d < D, other=0.0)
    folded = tl.load(folded_ptr + (pair_k * D_PAD + offs_d[:, None]) * D_PAD + offs_d[None, :])
    gathered = tl.zeros([D_PAD, D_PAD], tl.float32)
    taken = tl.zeros([D_PAD], tl.float32)
    bias = tl.zeros([D_PAD], tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(len_q, TILE))
    for tile in tl.range(first, last, num_stages=STAGES):
        row = tile * TILE
        q = load_tile(None, q_ptr, batch, head, row, len_q, stride_q_b, stride_q_s, stride_q_h, TILE, D, D_PAD, False)
        do = load_tile(None, dout_ptr, batch, head, row, len_q, stride_do_b, stride_do_s, stride_do_h, TILE, D, D_PAD, False)
        phi = apply_feature_map(q.to(tl.float32), D, D_PAD, FEATURE_MAP)
        share = phi * mass[None, :]
        denominator = tl.sum(share, 1) + eps
        share = share / denominator[:, None]
        products = tl.dot(do, folded.T)  # [TILE, D_PAD]
        along = tl.sum(share * products, 1)
        gathered = tl.dot(share.to(do.dtype).T, do, gathered)
        taken += tl.sum(share * along[:, None], 0)
        bias += tl.sum(do.to(tl.float32), 0)
        if FEATURE_MAP == "softmax":
            grad = share * (products - along[:, None])
            dq = grad - phi * tl.sum(grad, 1)[:, None]
        else:
            grad = (products - along[:, None]) * (mass[None, :] / denominator[:, None])
            dq = through_feature_map(grad, q.to(tl.float32), phi, FEATURE_MAP)
        dq += load_tile(None, dq_ptr, batch, head, row, len_q, stride_dq_b, stride_dq_s, stride_dq_h,
                        TILE, D, D_PAD, False).to(tl.float32)
        store_tile(dq_ptr, dq, batch, head, row, len_q, stride_dq_b, stride_dq_s, stride_dq_h, TILE, D, D_PAD)
    slot = pair.to(tl.int64) * n_splits + split
    tl.store(part_ptr + slot * D_PAD * D_PAD + offs_d[:, None] * D_PAD + offs_d[None, :], gathered)
    tl.store(part_taken_ptr + slot * D_PAD + offs_d, taken)
    tl.store(part_bias_ptr + slot * D + offs_d, bias, mask=offs_d < D)


@triton.jit(do_not_specialize=["n_heads", "n_pairs", "len_k"])
def _sla_bwd_kv_kernel(
    k_ptr, v_ptr, dk_ptr, dv_ptr, spread_ptr, mass_ptr, taken_ptr,
    stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_dk_b, stride_dk_s, stride_dk_h, stride_dv_b, stride_dv_s, stride_dv_h, n_heads, n_pairs, len_k,
    SCALE: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, FEATURE_MAP: tl.constexpr,
):
    """Adds to dk and dv; `spread` is E / SCALE."""
    pair = tl.program_id(0) % n_pairs
    row = (tl.program_id(0) // n_pairs) * TILE
    batch = pair // n_heads
    head = pair % n_heads
    offs_d = tl.arange(0, D_PAD)
    at = pair.to(tl.int64) * D + offs_d
    mass = tl.load(mass_ptr + at, mask=offs_d < D, other=0.0)
    taken = tl.load(taken_ptr + at, mask=offs_d < D, other=0.0)
    inverse = tl.where(mass == 0.0, 0.0, 1.0 / mass)
    spread = tl.load(spread_ptr + (pair.to(tl.int64) * D_PAD + offs_d[:, None]) * D_PAD + offs_d[None, :])
    k = load_tile(None, k_ptr, batch, head, row, len_k, stride_k_b, stride_k_s, stride_k_h, TILE, D, D_PAD, False)
    v = load_tile(None, v_ptr, batch, head, row, len_k, stride_v_b, stride_v_s, stride_v_h, TILE, D, D_PAD, False)
    x = k.to(tl.float32)
    phi = apply_feature_map(x, D, D_PAD, FEATURE_MAP)
    part = phi * inverse[None, :]
    dv = tl.dot((part * SCALE).to(v.dtype), spread)
    dv += load_tile(None, dv_ptr, batch, head, row, len_k, stride_dv_b, stride_dv_s, stride_dv_h,
                    TILE, D, D_PAD, False).to(tl.float32)
    store_tile(dv_ptr, dv, batch, head, row, len_k, stride_dv_b, stride_dv_s, stride_dv_h, TILE, D, D_PAD)
    grad = tl.dot(v, spread.T) * SCALE - taken[None, :]
    if FEATURE_MAP == "softmax":
        grad = part * grad
        dk = grad - phi * tl.sum(grad, 1)[:, None]
    else:
        dk = through_feature_map(grad * inverse[None, :], x, phi, FEATURE_MAP)
    dk += load_tile(None, dk_ptr, batch, head, row, len_k, stride_dk_b, stride_dk_s, stride_dk_h,
                    TILE, D, D_PAD, False).to(tl.float32)
    store_tile(dk_ptr, dk, batch, head, row, len_k, stride_dk_b, stride_dk_s, stride_dk_h, TILE, D, D_PAD)
