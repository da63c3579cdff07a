"""Run the Triton engine: the functions of `reference`, by kernels. Imported with triton, on first use."""

# Arguments of kernels stand in groups (pointers, strides, sizes, constants), not one a line.
# fmt: off

from __future__ import annotations

import torch
import triton

from attnmux_sla.kernels import linear
from attnmux_sla.kernels.configs import Configs, kernel_configs
from attnmux_sla.prepare import EPS

# Features of a softmax lie in [0, 1]; in float16 small ones keep their precision if they are scaled up on the way.
SOFTMAX_SCALE = 256
# Likewise phi(k) / z, whose mean over the sequence is the inverse of its length, against sums over all queries.
SPREAD_SCALE = 256
# Rows of a state per program, and partial states loaded at once, where states are added up.
REDUCE_ROWS, REDUCE_PARTS = 2, 16
# Rows, and channels per step, of a product in float32.
PROJECT_ROWS, PRODUCT_STEP = 16, 32


def _configs(x: torch.Tensor) -> Configs:
    """The tuning row for the card that x is on; in the interpreter that of the largest."""
    return kernel_configs(torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0))


def pool(x: torch.Tensor, block: int) -> torch.Tensor:
    """Means of blocks, float32 [B, H, N, D]."""
    batch, length, heads, head_dim = x.shape
    n_blocks = triton.cdiv(length, block)
    config = _configs(x).pool
    pooled = torch.empty(batch, heads, n_blocks, head_dim, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        linear._sla_pool_kernel[(batch * heads * n_blocks,)](
            x, pooled, *x.stride()[:3], heads, batch * heads, length, n_blocks,
            BLOCK=block, TILE=min(block, config.tile), D=head_dim, D_PAD=triton.next_power_of_2(head_dim),
            num_warps=config.warps)
    return pooled


def _reduce(part: torch.Tensor, part_mass: torch.Tensor, pairs: int, head_dim: int, part_range: torch.Tensor | None = None):
    """Sums over the parts [pairs, parts, D_PAD, D_PAD] and [pairs, parts, D_PAD]; extremes over [pairs, parts, 2, D_PAD]."""
    d_pad = part.shape[-1]
    state = torch.empty(pairs, head_dim, head_dim, device=part.device, dtype=torch.float32)
    mass = torch.empty(pairs, head_dim, device=part.device, dtype=torch.float32)
    extremes = torch.empty(pairs if part_range is not None else 0, 2, head_dim, device=part.device, dtype=torch.float32)
    linear._sla_reduce_kernel[(pairs, d_pad // REDUCE_ROWS)](
        part, part_mass, part_mass if part_range is None else part_range, state, mass, extremes, part.shape[1],
        ROWS=REDUCE_ROWS, PARTS=REDUCE_PARTS, D=head_dim, D_PAD=d_pad, RANGE=part_range is not None, num_warps=4)
    return state, mass, extremes


def _project(x, mass, weight, out, *, transposed: bool, scale: float = 1.0):
    """Fill out [pairs, D_PAD, D_PAD] with x W^T, or x W, over the mass and times scale; weight and mass may be None."""
    head_dim, d_pad = x.shape[-1], out.shape[-1]
    strides = (0, 0) if weight is None else weight.stride()
    linear._sla_project_kernel[(out.shape[0], triton.cdiv(d_pad, PROJECT_ROWS))](
        x, x if mass is None else mass, x if weight is None else weight, out,
        *(strides[::-1] if transposed else strides), scale,
        ROWS=PROJECT_ROWS, STEP=PRODUCT_STEP, D=head_dim, D_PAD=d_pad,
        HAS_MASS=mass is not None, HAS_WEIGHT=weight is not None, num_warps=4)
    return out


def _fold(state: torch.Tensor, mass: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """N, [B * H_kv, D_PAD, D_PAD] in the half type of the products it goes into."""
    pairs, d_pad = state.shape[0] * state.shape[1], triton.next_power_of_2(state.shape[3])
    folded = torch.empty(pairs, d_pad, d_pad, device=state.device, dtype=dtype)
    return _project(state, mass, weight, folded, transposed=True)


def summarize_keys(k: torch.Tensor, v: torch.Tensor, block_k: int, feature_map: str, needs_range: bool = False):
    """Pooled keys [B, H_kv, N_k, D], state [B, H_kv, D, D], mass [B, H_kv, D], float32, and the range of v; see `reference`."""
    batch, length, heads, head_dim = k.shape
    config = _configs(k).summarize
    n_blocks, d_pad, pairs = triton.cdiv(length, block_k), triton.next_power_of_2(head_dim), batch * heads
    pooled = torch.empty(batch, heads, n_blocks, head_dim, device=k.device, dtype=torch.float32)
    blocks_per_split = config.split // block_k
    n_splits = triton.cdiv(n_blocks, blocks_per_split)
    part = torch.empty(pairs, n_splits, d_pad, d_pad, device=k.device, dtype=torch.float32)
    part_mass = torch.empty(pairs, n_splits, d_pad, device=k.device, dtype=torch.float32)
    part_range = torch.empty(pairs, n_splits, 2, d_pad, device=k.device, dtype=torch.float32) if needs_range else None
    # A stage holds a whole block of k and of v in shared memory.
    stages = max(1, config.stages * 64 // block_k)
    with torch.cuda.device_of(k):
        linear._sla_summarize_kernel[(pairs * n_splits,)](
            k, v, pooled, part, part_mass, part_mass if part_range is None else part_range, *k.stride()[:3], *v.stride()[:3],
            heads, pairs, length, n_blocks, n_splits, blocks_per_split,
            BLOCK=block_k, TILE=min(block_k, config.tile), D=head_dim, D_PAD=d_pad, FEATURE_MAP=feature_map,
            PHI_SCALE=SOFTMAX_SCALE if feature_map == "softmax" else 1, RANGE=needs_range, STAGES=stages, num_warps=config.warps,
            maxnreg=config.registers)
        state, mass, extremes = _reduce(part, part_mass, pairs, head_dim, part_range)
    shape = (batch, heads, 2, head_dim) if needs_range else (0, 2, head_dim)
    return pooled, state.view(batch, heads, head_dim, head_dim), mass.view(batch, heads, head_dim), extremes.view(shape)


def add_linear_branch(q, sparse, state, mass, weight, bias, feature_map: str) -> torch.Tensor:
    """The sparse branch plus the projected linear branch, [B, S_q, H, D] contiguous in the type of q."""
    batch, len_q, heads, head_dim = q.shape
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    config = _configs(q).finish
    pairs, tile = batch * heads, config.tile
    with torch.cuda.device_of(q):
        folded = _fold(state, mass, weight, q.dtype)
        linear._sla_finish_kernel[(pairs * triton.cdiv(len_q, tile),)](
            q, sparse, out, folded, mass, mass if bias is None else bias,
            *q.stride()[:3], *sparse.stride()[:3], *out.stride()[:3], heads, pairs, len_q, EPS,
            GROUP=heads // state.shape[1], TILE=tile, D=head_dim, D_PAD=folded.shape[-1], FEATURE_MAP=feature_map,
            HAS_BIAS=bias is not None, num_warps=config.warps)
    return out


def linear_backward(dout, q, k, v, state, mass, weight, feature_map: str, sparse_grads):
    """dq, dk, dv: those of the sparse branch, added to in place; and the gradients of the projection, float32."""
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1], k.shape[2]
    pairs, pairs_k, d_pad = batch * heads, batch * heads_k, triton.next_power_of_2(head_dim)
    config, config_kv = _configs(q).backward_q, _configs(q).backward_kv
    dq, dk, dv = sparse_grads
    tiles_per_split = config.split // config.tile
    n_splits = triton.cdiv(triton.cdiv(len_q, config.tile), tiles_per_split)
    with torch.cuda.device_of(q):
        folded = _fold(state, mass, weight, q.dtype)
        part = torch.empty(pairs, n_splits, d_pad, d_pad, device=q.device, dtype=torch.float32)
        part_taken = torch.empty(pairs, n_splits, d_pad, device=q.device, dtype=torch.float32)
        part_bias = torch.empty(pairs * n_splits, head_dim, device=q.device, dtype=torch.float32)
        linear._sla_bwd_q_kernel[(pairs * n_splits,)](
            q, dout, dq, folded, mass, part, part_taken, part_bias,
            *q.stride()[:3], *dout.stride()[:3], *dq.stride()[:3], heads, pairs, len_q, n_splits, tiles_per_split, EPS,
            GROUP=heads // heads_k, TILE=config.tile, D=head_dim, D_PAD=d_pad, FEATURE_MAP=feature_map,
            STAGES=config.stages, num_warps=config.warps)
        # The query heads of a key head lie side by side, so their parts are just more parts.
        parts = heads // heads_k * n_splits
        gathered, taken, _ = _reduce(part.view(pairs_k, parts, d_pad, d_pad), part_taken.view(pairs_k, parts, d_pad),
                                  pairs_k, head_dim)
        spread = torch.empty(pairs_k, d_pad, d_pad, device=q.device, dtype=q.dtype)
        _project(gathered, None, weight, spread, transposed=False, scale=1 / SPREAD_SCALE)
        columns = 32
        part_weight = torch.empty(pairs_k, head_dim, head_dim, device=q.device, dtype=torch.float32)
        linear._sla_weight_grad_kernel[(pairs_k, triton.cdiv(head_dim, columns))](
            gathered, state, mass, part_weight,
            COLUMNS=columns, STEP=16, D=head_dim, D_PAD=d_pad, num_warps=4)
        linear._sla_bwd_kv_kernel[(pairs_k * triton.cdiv(len_k, config_kv.tile),)](
            k, v, dk, dv, spread, mass, taken,
            *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], heads_k, pairs_k, len_k,
            SCALE=SPREAD_SCALE, TILE=config_kv.tile, D=head_dim, D_PAD=d_pad, FEATURE_MAP=feature_map,
            num_warps=config_kv.warps)
    return dq, dk, dv, part_weight.sum(0), part_bias.sum(0)
