"""SLA's linear branch at the end of a tile of the Hopper kernel: one more product, of the shares of the features and the state.

It is that of `attnmux_sla`: a query takes the share c = phi(q) z / (phi(q) . z + eps) of every feature, and the branch is c N,
with N the folded state and z the mass of the head.
"""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from attnmux_sla.prepare import EPS as EPS_

EPS = gl.constexpr(EPS_)


@dataclass(frozen=True)
class LinearBranch:
    """What the linear branch needs, for softmax features.

    q: [B, S_q, H, D], which TMA can address. folded: N, [B * H_kv, D, D] in the type of q. mass: float32 [B, H_kv, D].
    bias: [D], or None.
    """

    q: torch.Tensor
    folded: torch.Tensor
    mass: torch.Tensor
    bias: torch.Tensor | None


@gluon.jit
def load_linear(
    x_desc, state_desc, x_full, x_empty, phase, x_buf, state_buf, batch, head, bh_k, place, D: gl.constexpr,
):
    """Fetch the rows of q of a tile, as they were before quantisation, and the folded state of its head."""
    PANELS: gl.constexpr = D // 64
    mbarrier.wait(x_empty.index(0), phase)
    mbarrier.expect(x_full.index(0), 2 * 64 * D * 2 + D * D * 2)
    for w in gl.static_range(2):
        tma.async_copy_global_to_shared(x_desc, [batch, head, place * 128 + w * 64, 0], x_full.index(0), x_buf.index(w))
    for p in gl.static_range(PANELS):
        for r in gl.static_range(PANELS):
            tma.async_copy_global_to_shared(
                state_desc, [bh_k, 0, r * 64, p * 64], x_full.index(0), state_buf.index(p * PANELS + r))


@gluon.jit
def add_linear_branch(o, x_buf, state_buf, x_full, x_empty, phase, mass_ptr, bias_ptr, bh_k, D: gl.constexpr, BIAS: gl.constexpr):
    """The output [64, D] of a consumer's rows plus their linear branch, in float32."""
    DTYPE: gl.constexpr = x_buf.dtype
    LL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    offs_d = gl.arange(0, D, layout=gl.SliceLayout(0, LL))
    mass = gl.load(mass_ptr + bh_k.to(gl.int64) * D + offs_d)
    mbarrier.wait(x_full.index(0), phase)
    x = x_buf._reinterpret(DTYPE, [64, D], SHARED).load(LL).to(gl.float32)
    phi = gl.exp2((x - gl.max(x, 1)[:, None]) * 1.4426950408889634)
    share = phi * (1.0 / gl.sum(phi, 1))[:, None] * mass[None, :]
    share = share * (1.0 / (gl.sum(share, 1) + EPS))[:, None]
    out = gl.convert_layout(o, LL)
    if BIAS:
        out = out + gl.load(bias_ptr + offs_d).to(gl.float32)[None, :]
    operand = gl.convert_layout(share.to(DTYPE), gl.DotOperandLayout(0, LL, 2))
    out = warpgroup_mma(operand, state_buf._reinterpret(DTYPE, [D, D], SHARED), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])
    mbarrier.arrive(x_empty.index(0))
    return out
