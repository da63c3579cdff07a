"""Softmax and operands of the Hopper kernel, in registers: scores to weights, weights to the operand of the next product."""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# [64, 4]: one number of every row for each of the four threads that hold its scores.
SUMS = gl.constexpr(gl.DistributedLinearLayout(
    [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]))


@gluon.jit
def _halves(x):
    """[64, 128] -> the columns of the first and of the second block, [64, 64] each."""
    return x.reshape([64, 2, 64]).permute((0, 2, 1)).split()


@gluon.jit
def _by_thread(x):
    """[64, 64] -> [64, 4, 16]: for every row the columns of each of the four threads that hold it."""
    return x.reshape([64, 8, 4, 2]).permute((0, 2, 1, 3)).reshape([64, 4, 16])


@gluon.jit
def softmax(s, q_scale, scale_a, scale_b, m, l, valid_a, valid_b, FIRST: gl.constexpr, SHIFT: gl.constexpr):
    """int32 scores of 128 keys -> weights times 2 ** SHIFT, new maximum, factor for what came before, new partial sums.

    q_scale: of the rows. scale_a, scale_b: of the two key blocks. The maxima are those of the integers, which are exact and
    cost less: sm_90 compares three integers in one instruction. Sums stay apart for the four threads of a row, [64, 4].
    """
    SL: gl.constexpr = s.type.layout
    RS: gl.constexpr = gl.SliceLayout(1, SL)
    if FIRST:
        # Scales are positive normal numbers (see the floors in `prepare`), so that -inf stays -inf.
        if valid_a + valid_b < 128:
            cols = gl.arange(0, 128, layout=gl.SliceLayout(0, SL))
            keep = (cols < gl.minimum(valid_a, 64)) | ((cols >= 64) & (cols < 64 + valid_b))
            f = gl.where(keep[None, :], s.to(gl.float32), float("-inf"))
        else:
            f = s.to(gl.float32)
        f0, f1 = _halves(f)
        x0 = gl.max(_by_thread(f0), 2)
        x1 = gl.max(_by_thread(f1), 2)
    else:
        i0, i1 = _halves(s)
        x0 = gl.max(_by_thread(i0), 2).to(gl.float32)
        x1 = gl.max(_by_thread(i1), 2).to(gl.float32)
        f0 = i0.to(gl.float32)
        f1 = i1.to(gl.float32)
    RT: gl.constexpr = gl.SliceLayout(1, x0.type.layout)
    RH: gl.constexpr = gl.SliceLayout(1, f0.type.layout)
    q_thread = gl.convert_layout(q_scale, RT)[:, None]
    m_new = gl.convert_layout(gl.max(gl.maximum(x0 * (q_thread * scale_a), x1 * (q_thread * scale_b)), 1), RS)
    if FIRST:
        # The floor keeps a fully masked row at weights of 0 instead of NaN.
        m_new = gl.maximum(m_new, -1e30)
    else:
        m_new = gl.maximum(m, m_new)
    q_half = gl.convert_layout(q_scale, RH)
    scale0 = q_half * scale_a
    scale1 = q_half * scale_b
    m_half = gl.convert_layout(m_new, RH) - SHIFT
    p0 = gl.exp2(f0 * scale0[:, None] - m_half[:, None])
    p1 = gl.exp2(f1 * scale1[:, None] - m_half[:, None])
    part = gl.convert_layout(gl.sum(_by_thread(p0 + p1), 2), SUMS)
    p = gl.convert_layout(gl.join(p0, p1).permute((0, 2, 1)).reshape([64, 128]), SL)
    if FIRST:
        return p, m_new, gl.full([64], 1.0, gl.float32, RS), part
    else:
        alpha = gl.exp2(m - m_new)
        return p, m_new, alpha, l * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None] + part


@gluon.jit
def _unpack(x, LAYOUT: gl.constexpr):
    """int32 [64, K / 4] -> e4m3 operand [64, K] in LAYOUT, the same registers.

    8-bit tensors must not live across a loop or a branch: Triton hands every byte on in a register of its own (64 registers
    instead of 16), and warpgroup_mma_wait refuses them as dependencies. So they are carried as int32.
    """
    # Two steps, which LLVM folds back to nothing.
    low = x.to(gl.int16)
    high = (x >> 16).to(gl.int16)
    y = gl.join(gl.join(low.to(gl.int8), high.to(gl.int8)), gl.join((low >> 8).to(gl.int8), (high >> 8).to(gl.int8)))
    y = gl.convert_layout(y.reshape([x.shape[0], x.shape[1] * 4]), LAYOUT)
    return y.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def pack(p, LAYOUT: gl.constexpr, DTYPE: gl.constexpr, FP8: gl.constexpr):
    """Weights as operand in DTYPE, or as packed e4m3, whose keys are in the order of v8: no exchange between threads."""
    if FP8:
        p = p.reshape([64, 8, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, 128])
        p = gl.convert_layout(p, LAYOUT)
        a, b = p.reshape([64, 32, 2, 2]).split()
        a0, a1 = a.split()
        b0, b1 = b.split()
        return gl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; "
            "mov.b32 $0, {lo, hi}; }", "=r,f,f,f,f", [a0, b0, a1, b1], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.convert_layout(p.to(DTYPE), LAYOUT)


@gluon.jit
def ready(p, never, LAYOUT: gl.constexpr, FP8: gl.constexpr):
    """Weights as operand of the next product; to be called before the first of a group of products.

    never is 0, which no compiler knows. Without a real instruction here ptxas gives the next weights the registers of those in
    use (they are one loop variable, plain copies are seen through) and serialises every product (C7513).
    """
    if FP8:
        return _unpack(p ^ never, LAYOUT)
    else:
        return p


def _rescaling(registers: int):
    """Assembly and its operands: a thread's registers of two rows times their factors, if one in its warp is not 1."""
    factors = (2 * registers, 2 * registers + 2)
    products = " ".join(f"mul.f32 ${i}, ${i}, ${factors[i % 4 // 2]};" for i in range(registers))
    text = (f"{{ .reg .pred p; setp.neu.f32 p, ${factors[0]}, 0f3F800000; setp.neu.or.f32 p, ${factors[1]}, 0f3F800000, p; "
            f"vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE; {products} DONE: }}")
    operands = ",".join(["=f"] * registers + [str(i) for i in range(registers)] + ["f"] * registers)
    return gl.constexpr(text), gl.constexpr(operands)


RESCALING_64, OPERANDS_64 = _rescaling(64)
RESCALING_32, OPERANDS_32 = _rescaling(32)


@gluon.jit
def rescale(x, factor, D: gl.constexpr):
    """Return x [64, D] times the factors of its rows; a warp whose 16 rows all have 1 skips it, as most do once maxima stand."""
    x, factor = gl.broadcast(x, factor[:, None])
    if D == 128:
        return gl.inline_asm_elementwise(RESCALING_64, OPERANDS_64, [x, factor], dtype=gl.float32, is_pure=False, pack=64)
    else:
        return gl.inline_asm_elementwise(RESCALING_32, OPERANDS_32, [x, factor], dtype=gl.float32, is_pure=False, pack=32)
