"""The oracle: the linear branch of SLA by its definition, and its gradients in closed form. Any device, any floating type.

With a feature map phi >= 0 over the D channels of a token, and for a query a over the keys b that its branch sees:

    S = sum_b phi(k_b)^T v_b   [D, D]          z = sum_b phi(k_b)   [D]
    linear_a = phi(q_a) S / (phi(q_a) . z + eps)
    out_a    = sparse_a + linear_a W^T + bias

Because W acts on the right, (phi(q) S) W^T = phi(q) (S W^T): the projection is folded into the state. Engines hold the state as

    N = diag(1 / z) S W^T                      the mean of the projected values, seen by each feature
    c = phi(q) * z / (phi(q) . z + eps)        how much of each feature a query takes; sums to at most 1
    linear W^T = c N

in which no number grows with the sequence, so that half precision neither overflows nor loses small features.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attnmux_blocksparse.prepare import compute_dtype
from attnmux_sla.prepare import EPS, count_blocks, pool_blocks

__all__ = [
    "add_linear_branch",
    "apply_feature_map",
    "linear_attention",
    "linear_backward",
    "pool",
    "summarize_keys",
]

# Most numbers that the block states of one chunk of heads may take (256 MB in float32).
_CHUNK_NUMBERS = 2**26

pool = pool_blocks


def apply_feature_map(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """Return phi(x) `[..., D]`: softmax over D, elu + 1, or relu."""
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "elu":
        return F.elu(x) + 1
    return F.relu(x)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str,
    visible: torch.Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
) -> torch.Tensor:
    """Return the linear branch before its projection, differentiable.

    Args:
        q: `[B, S_q, H, D]`, any strides; not modified.
        k: `[B, S_k, H_kv, D]`, likewise.
        v: `[B, S_k, H_kv, D]`, likewise.
        feature_map: "softmax", "elu" or "relu".
        visible: bool `[B, H, N_q, N_k]`, which key blocks a query block sees; None = all keys.
        block_q: Tokens of a query block.
        block_k: Tokens of a key block.

    Returns:
        `[B, S_q, H, D]`, float32, float64 for float64; zeros where nothing is seen.

    Numerics:
        The states of the blocks that are seen are added up; nothing is subtracted. Memory: D * D numbers for every block of
        a few heads at a time; backward computes them again.
    """
    dtype, group = compute_dtype(q.dtype), q.shape[2] // k.shape[2]
    features_q = apply_feature_map(q.to(dtype), feature_map).transpose(1, 2)  # [B, H, S_q, D]
    features_k = apply_feature_map(k.to(dtype), feature_map).transpose(1, 2)
    values = v.to(dtype).transpose(1, 2)
    if visible is None:
        state = (features_k.transpose(-1, -2) @ values).repeat_interleave(group, 1)
        mass = features_k.sum(-2, keepdim=True).repeat_interleave(group, 1)
        return _divide(features_q @ state, features_q, mass).transpose(1, 2)
    heads = [x.flatten(0, 1) for x in (features_q, *(x.repeat_interleave(group, 1) for x in (features_k, values)))]
    sees = visible.expand(q.shape[0], q.shape[2], -1, -1).flatten(0, 1)
    step = max(1, _CHUNK_NUMBERS // ((sees.shape[1] + sees.shape[2]) * q.shape[3] ** 2))
    recomputes = torch.is_grad_enabled() and step < sees.shape[0]
    chunks = []
    for start in range(0, sees.shape[0], step):
        part_q, part_k, part_v, part_sees = (x[start : start + step] for x in (*heads, sees))
        if recomputes:
            attended: torch.Tensor = checkpoint(
                _attend_blocks, part_q, part_k, part_v, part_sees, block_q, block_k,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            attended = _attend_blocks(part_q, part_k, part_v, part_sees, block_q, block_k)
        chunks.append(attended)
    return torch.cat(chunks).view(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _attend_blocks(
    features_q: torch.Tensor,
    features_k: torch.Tensor,
    values: torch.Tensor,
    sees: torch.Tensor,
    block_q: int,
    block_k: int,
) -> torch.Tensor:
    """Return `[R, S_q, D]` for R heads, each query block attending to the key blocks that it sees `[R, N_q, N_k]`."""
    R, S, D = features_q.shape
    features_q, features_k, values = (
        F.pad(x, (0, 0, 0, -x.shape[1] % block)).view(R, count_blocks(x.shape[1], block), block, D)
        for x, block in ((features_q, block_q), (features_k, block_k), (values, block_k))
    )
    states = features_k.transpose(-1, -2) @ values  # [R, N_k, D, D]
    weights = sees.to(states.dtype)
    seen_state = (weights @ states.flatten(2)).view(R, -1, D, D)  # [R, N_q, D, D]
    seen_mass = (weights @ features_k.sum(2))[:, :, None]  # [R, N_q, 1, D]
    return _divide(features_q @ seen_state, features_q, seen_mass).flatten(1, 2)[:, :S]


def _divide(numerator: torch.Tensor, features_q: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    return numerator / ((features_q * mass).sum(-1, keepdim=True) + EPS)


def summarize_keys(
    k: torch.Tensor, v: torch.Tensor, block_k: int, feature_map: str, needs_range: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the pooled keys `[B, H_kv, N_k, D]`, the state S `[B, H_kv, D, D]`, the mass z `[B, H_kv, D]`, the range of v.

    All in float32, float64 for float64 inputs. The range is the largest and the least number of every channel,
    `[B, H_kv, 2, D]`, and without elements where it is not needed.
    """
    dtype = compute_dtype(k.dtype)
    features = apply_feature_map(k.to(dtype), feature_map).transpose(1, 2)
    state = features.transpose(-1, -2) @ v.to(dtype).transpose(1, 2)
    extremes = v.new_empty(0, 2, v.shape[3], dtype=dtype)
    if needs_range:
        extremes = torch.stack([v.amax(1), v.amin(1)], 2).to(dtype)
    return pool_blocks(k, block_k), state, features.sum(-2), extremes


def add_linear_branch(
    q: torch.Tensor,
    sparse: torch.Tensor,
    state: torch.Tensor,
    mass: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    feature_map: str,
) -> torch.Tensor:
    """Return `sparse` `[B, S_q, H, D]` plus the projected linear branch over all keys, in the dtype of q."""
    dtype, group = compute_dtype(q.dtype), q.shape[2] // state.shape[1]
    shares, _, _ = _shares(q, mass, feature_map)
    folded = _fold(state, mass, weight).repeat_interleave(group, 1)
    out = sparse.to(dtype) + (shares @ folded).transpose(1, 2)
    return (out if bias is None else out + bias.to(dtype)).to(q.dtype).contiguous()


def linear_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    mass: torch.Tensor,
    weight: torch.Tensor | None,
    feature_map: str,
    sparse_grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv of both branches, and the gradients of the projection in float32.

    With shares c, folded state N, P = dO N^T and r = rowsum(c * P):

        dphi(q) = z (P - r) / (phi(q) . z + eps)
        A = sum_rows c^T dO    E = A W    u = sum_rows r c
        dphi(k) = (V E^T - u) / z    dV = (phi(k) / z) E    dW = A^T diag(1 / z) S    dbias = sum dO

    Args:
        dout: `[B, S_q, H, D]`.
        q: As in the forward, and so k, v, weight and the feature map.
        k: `[B, S_k, H_kv, D]`.
        v: `[B, S_k, H_kv, D]`.
        state: S `[B, H_kv, D, D]`.
        mass: z `[B, H_kv, D]`.
        weight: `[D, D]`, or None for no projection.
        feature_map: "softmax", "elu" or "relu".
        sparse_grads: dq, dk and dv of the sparse branch.
    """
    dtype, group = compute_dtype(q.dtype), q.shape[2] // k.shape[2]

    def sum_groups(x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, group, *x.shape[2:]).sum(2)

    shares, features_q, denominator = _shares(q, mass, feature_map)
    gradient = dout.to(dtype).transpose(1, 2)
    mass_q = mass.repeat_interleave(group, 1)[:, :, None]
    products = gradient @ _fold(state, mass, weight).repeat_interleave(group, 1).transpose(-1, -2)
    row = (shares * products).sum(-1, keepdim=True)
    dq = _through_feature_map(
        mass_q / denominator * (products - row), q.to(dtype).transpose(1, 2), features_q, feature_map
    )
    gathered = sum_groups(shares.transpose(-1, -2) @ gradient)
    spread = gathered if weight is None else gathered @ weight.to(dtype)
    taken = sum_groups((shares * row).sum(-2))
    inverse = _inverse(mass)[:, :, None]
    keys, values = k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
    features_k = apply_feature_map(keys, feature_map)
    dfeatures = (values @ spread.transpose(-1, -2) - taken[:, :, None]) * inverse
    dk = _through_feature_map(dfeatures, keys, features_k, feature_map)
    dv = (features_k * inverse) @ spread
    dweight = (gathered.transpose(-1, -2) @ (state * inverse.transpose(-1, -2))).sum((0, 1))
    dq, dk, dv = (
        (sparse.to(dtype) + linear.transpose(1, 2)).to(sparse.dtype).contiguous()
        for sparse, linear in zip(sparse_grads, (dq, dk, dv), strict=True)
    )
    return dq, dk, dv, dweight, gradient.sum((0, 1, 2))


def _shares(q: torch.Tensor, mass: torch.Tensor, feature_map: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return c and phi(q), both `[B, H, S_q, D]`, and the denominator `[B, H, S_q, 1]`."""
    features = apply_feature_map(q.to(mass.dtype), feature_map).transpose(1, 2)
    weighted = features * mass.repeat_interleave(q.shape[2] // mass.shape[1], 1)[:, :, None]
    denominator = weighted.sum(-1, keepdim=True) + EPS
    return weighted / denominator, features, denominator


def _fold(state: torch.Tensor, mass: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Return N `[B, H_kv, D, D]`."""
    projected = state if weight is None else state @ weight.to(state.dtype).t()
    return projected * _inverse(mass)[..., None]


def _inverse(mass: torch.Tensor) -> torch.Tensor:
    """Return 1 / z, and 0 for a feature that no key has."""
    return torch.where(mass == 0, 0.0, 1 / mass)


def _through_feature_map(
    gradient: torch.Tensor, x: torch.Tensor, features: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """Return the gradient of x from that of phi(x)."""
    if feature_map == "softmax":
        return features * (gradient - (features * gradient).sum(-1, keepdim=True))
    if feature_map == "elu":
        return gradient * torch.where(x > 0, 1.0, features)
    return gradient * (x > 0)
