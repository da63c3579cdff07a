"""Attention among the tile means, in float32: small, but never with all its weights in memory."""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 16, 32
# Weights that the backward holds at once, 64 MB.
CHUNK_NUMBERS = 2**24


@triton.jit(do_not_specialize=["n_tiles"])
def _vsa_coarse_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, n_tiles, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, D_PAD)
    is_row = (rows < n_tiles)[:, None] & (offs_d < D)[None, :]
    at = (pair * n_tiles + rows[:, None]) * D + offs_d[None, :]
    q = tl.load(q_ptr + at, mask=is_row, other=0.0)
    m = tl.full([ROWS], -1e30, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    base = (pair // GROUP) * n_tiles
    for start in range(0, n_tiles, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = (columns < n_tiles)[:, None] & (offs_d < D)[None, :]
        offsets = (base + columns[:, None]) * D + offs_d[None, :]
        k = tl.load(k_ptr + offsets, mask=is_column, other=0.0)
        v = tl.load(v_ptr + offsets, mask=is_column, other=0.0)
        s = tl.dot(q, k.T, input_precision="tf32x3") * scale  # [ROWS, COLUMNS]
        s = tl.where((columns < n_tiles)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - m_new[:, None])
        alpha = tl.exp(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision="tf32x3")
        m = m_new
    tl.store(out_ptr + at, acc / l[:, None], mask=is_row)
    tl.store(lse_ptr + pair * n_tiles + rows, m + tl.log(l), mask=rows < n_tiles)


def coarse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float):
    """Output [B, H, N, D] and LSE [B, H, N] of float32 means q [B, H, N, D], k and v [B, H_kv, N, D], all contiguous."""
    batch, heads, n_tiles, head_size = q.shape
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    with torch.cuda.device_of(q):
        _vsa_coarse_kernel[(triton.cdiv(n_tiles, ROWS), batch * heads)](
            q, k, v, out, lse, n_tiles, scale, GROUP=heads // k.shape[1], ROWS=ROWS, COLUMNS=COLUMNS,
            D=head_size, D_PAD=triton.next_power_of_2(head_size), num_warps=4)
    return out, lse


def coarse_backward(dout, q, k, v, out, lse, scale: float):
    """Gradients of the means, some heads at a time."""
    batch, heads, n_tiles, head_size = q.shape
    group = heads // k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    pairs_k = batch * k.shape[1]
    by_key_head = (pairs_k, group * n_tiles, head_size)
    q_, dout_, dq_ = (x.view(by_key_head) for x in (q, dout, dq))
    lse_, delta_ = (x.view(pairs_k, group * n_tiles, 1) for x in (lse, (out * dout).sum(-1)))
    k_, v_, dk_, dv_ = (x.view(pairs_k, n_tiles, head_size) for x in (k, v, dk, dv))
    step = max(1, CHUNK_NUMBERS // (group * n_tiles * n_tiles))
    for start in range(0, pairs_k, step):
        at = slice(start, start + step)
        weights = torch.baddbmm(lse_[at], q_[at], k_[at].transpose(1, 2), beta=-1, alpha=scale).exp_()
        torch.bmm(weights.transpose(1, 2), dout_[at], out=dv_[at])
        dscores = torch.baddbmm(delta_[at], dout_[at], v_[at].transpose(1, 2), beta=-1).mul_(weights).mul_(scale)
        torch.bmm(dscores, k_[at], out=dq_[at])
        torch.bmm(dscores.transpose(1, 2), q_[at], out=dk_[at])
    return dq, dk, dv
