"""Attention among the tile means, forward and backward, in float32: small, but never with all its weights in memory.

Products are float32 made of products of bfloat16 parts, on the tensor cores; neither autocast nor PyTorch's TF32 switch has a say.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 16, 32


@triton.jit
def _load_rows(ptr, pair, rows, n_tiles, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows [ROWS, D_PAD] of a contiguous [pairs, n_tiles, D], zeros beyond."""
    offs_d = tl.arange(0, D_PAD)
    mask = (rows < n_tiles)[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + (pair * n_tiles + rows[:, None]) * D + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, x, pair, rows, n_tiles, D: tl.constexpr, D_PAD: tl.constexpr):
    offs_d = tl.arange(0, D_PAD)
    mask = (rows < n_tiles)[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + (pair * n_tiles + rows[:, None]) * D + offs_d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["n_tiles"])
def _vsa_coarse_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n_tiles, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = _load_rows(q_ptr, pair, rows, n_tiles, D, D_PAD) * scale
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(0, n_tiles, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = _load_rows(k_ptr, pair // GROUP, columns, n_tiles, D, D_PAD)
        v = _load_rows(v_ptr, pair // GROUP, columns, n_tiles, D, D_PAD)
        s = tl.dot(q, k.T, input_precision=PRECISION)  # [ROWS, COLUMNS]
        s = tl.where((columns < n_tiles)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - m_new[:, None])
        alpha = tl.exp(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    _store_rows(out_ptr, acc / l[:, None], pair, rows, n_tiles, D, D_PAD)
    tl.store(lse_ptr + pair * n_tiles + rows, m + tl.log(l), mask=rows < n_tiles)


@triton.jit(do_not_specialize=["n_tiles"])
def _vsa_coarse_bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, n_tiles, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of q, and delta = rowsum(dO * O) for the other kernel."""
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = _load_rows(q_ptr, pair, rows, n_tiles, D, D_PAD) * scale
    dout = _load_rows(dout_ptr, pair, rows, n_tiles, D, D_PAD)
    lse = tl.load(lse_ptr + pair * n_tiles + rows, mask=rows < n_tiles, other=0.0)
    delta = tl.sum(dout * _load_rows(out_ptr, pair, rows, n_tiles, D, D_PAD), 1)
    tl.store(delta_ptr + pair * n_tiles + rows, delta, mask=rows < n_tiles)
    dq = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(0, n_tiles, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = _load_rows(k_ptr, pair // GROUP, columns, n_tiles, D, D_PAD)
        v = _load_rows(v_ptr, pair // GROUP, columns, n_tiles, D, D_PAD)
        p = tl.exp(tl.dot(q, k.T, input_precision=PRECISION) - lse[:, None])
        ds = p * (tl.dot(dout, v.T, input_precision=PRECISION) - delta[:, None])
        ds = tl.where((columns < n_tiles)[None, :], ds, 0.0)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    _store_rows(dq_ptr, dq * scale, pair, rows, n_tiles, D, D_PAD)


@triton.jit(do_not_specialize=["n_tiles"])
def _vsa_coarse_bwd_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, n_tiles, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of ROWS key and value tiles, from COLUMNS query tiles of each of the group's heads at a time."""
    pair_k = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = _load_rows(k_ptr, pair_k, rows, n_tiles, D, D_PAD) * scale
    v = _load_rows(v_ptr, pair_k, rows, n_tiles, D, D_PAD)
    dk = tl.zeros([ROWS, D_PAD], tl.float32)
    dv = tl.zeros([ROWS, D_PAD], tl.float32)
    for g in range(GROUP):
        pair = pair_k * GROUP + g
        for start in range(0, n_tiles, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            q = _load_rows(q_ptr, pair, columns, n_tiles, D, D_PAD)
            dout = _load_rows(dout_ptr, pair, columns, n_tiles, D, D_PAD)
            # beyond the last query tile exp(0 - inf) = 0
            lse = tl.load(lse_ptr + pair * n_tiles + columns, mask=columns < n_tiles, other=float("inf"))
            delta = tl.load(delta_ptr + pair * n_tiles + columns, mask=columns < n_tiles, other=0.0)
            p = tl.exp(tl.dot(k, q.T, input_precision=PRECISION) - lse[None, :])  # [ROWS, COLUMNS]
            dv = tl.dot(p, dout, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, dout.T, input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    _store_rows(dk_ptr, dk * scale, pair_k, rows, n_tiles, D, D_PAD)
    _store_rows(dv_ptr, dv, pair_k, rows, n_tiles, D, D_PAD)


def _constants(q: torch.Tensor, k: torch.Tensor) -> dict[str, object]:
    return {
        "GROUP": q.shape[1] // k.shape[1], "ROWS": ROWS, "COLUMNS": COLUMNS, "D": q.shape[3],
        "D_PAD": triton.next_power_of_2(q.shape[3]),
        # The interpreter knows no parts.
        "PRECISION": "bf16x3" if q.is_cuda else "ieee", "num_warps": 4,
    }


def coarse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float):
    """Output [B, H, N, D] and LSE [B, H, N] of float32 means q [B, H, N, D], k and v [B, H_kv, N, D], all contiguous."""
    batch, heads, n_tiles, _ = q.shape
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    with torch.cuda.device_of(q):
        _vsa_coarse_kernel[(triton.cdiv(n_tiles, ROWS), batch * heads)](
            q, k, v, out, lse, n_tiles, scale, **_constants(q, k))
    return out, lse


def coarse_backward(dout, q, k, v, out, lse, scale: float):
    """Gradients of the means; arguments as `coarse_attention` takes and gives them, contiguous."""
    batch, heads, n_tiles, _ = q.shape
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    with torch.cuda.device_of(q):
        _vsa_coarse_bwd_dq_kernel[(triton.cdiv(n_tiles, ROWS), batch * heads)](
            dout, q, k, v, out, lse, delta, dq, n_tiles, scale, **_constants(q, k))
        _vsa_coarse_bwd_dkdv_kernel[(triton.cdiv(n_tiles, ROWS), batch * k.shape[1])](
            dout, q, k, v, lse, delta, dk, dv, n_tiles, scale, **_constants(q, k))
    return dq, dk, dv
