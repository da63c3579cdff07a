"""Quantisation: what the 8-bit tensors are, and how plain PyTorch makes them (the kernels make the same)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634
INT8_MAX = 127.0
E4M3_MAX = 448.0
P_SHIFT = math.log2(E4M3_MAX)
"""Weights are computed times 2 ** P_SHIFT for the e4m3 product: the largest becomes the largest e4m3."""

HEAD_SIZES = range(16, 129, 8)
"""Head sizes that are served, padded with zeros to 64 or 128 where the tensors are quantised."""

QUERY_TILE = 128
"""Rows of q8 come in multiples of this."""
KEY_BLOCK = 64
"""Keys that share one scale of K, and one transposed tile of V."""

SAMPLE_ROWS = 16
"""Keys lie in groups of this many, of which some give the mean that all are rid of (`sample_step`)."""

# Below these sizes a tensor counts as zero. They keep every product of two scales a normal float32, so that a score of -inf
# stays -inf; V needs only that 448 / maximum is finite.
SCORE_FLOOR = 1e-12
SCALE_FLOOR = 1e-20
VALUE_FLOOR = 1e-30


@dataclass(frozen=True)
class QuantisedTensors:
    """One call's tensors in 8 bits, heads first, the head padded with zeros to D' = 64 or 128. Q and K are rotated.

    q8: int8 [B, H, S_q', D'], S_q' = S_q rounded up to 128; rows beyond S_q are zero.
    q_scale: float32 [B, H, S_q'], one for each row, |softmax_scale| * log2(e) / D' included (the sign is in q8).
    k8: int8 [B, H_kv, N_k * 64, D'], keys minus their mean over a sample of the sequence; keys beyond S_k are zero.
    k_scale: float32 [B, H_kv, N_k], one for 64 keys.
    v8: float8_e4m3fn [B, H_kv, N_k, D', 64]: values minus their mean over the sequence, each block of 64 keys transposed, its
        keys in the order of `key_order`; keys beyond S_k are zero. None where P V is computed in the type of v.
    v_scale: float32 [B, H_kv, D'], one for each channel; None with v8.
    v_rest: float32 [B, H_kv, D'], the mean over the sequence of v - v_scale * v8, which the weights of a row, whose sum is 1,
        hand to every output; None with v8.
    lse_shift: float32 [B, H, S_q]: softmax_scale * q . mean, what smoothing took off every score of a row; None where no
        log-sum-exp is wanted.

    All are contiguous.
    """

    q8: torch.Tensor
    q_scale: torch.Tensor
    k8: torch.Tensor
    k_scale: torch.Tensor
    v8: torch.Tensor | None
    v_scale: torch.Tensor | None
    v_rest: torch.Tensor | None
    lse_shift: torch.Tensor | None


def padded_head(head_dim: int) -> int:
    """D': 64 or 128."""
    return 64 if head_dim <= 64 else 128


def sample_step(len_k: int) -> int:
    """Every how many-th group of `SAMPLE_ROWS` keys is in the sample, from the first on: about 4,096 keys are, or all.

    Any vector may be taken off all keys, as softmax does not see it; a mean over so many is as good as that over all.
    """
    return max(1, len_k // 4096)


def key_order(device: torch.device) -> torch.Tensor:
    """Key stored at each of the 64 places of a tile of v8, int64 [64].

    Within 16 keys, place 4 t + 2 h + e holds key 8 h + 2 t + e: the order in which thread t of a quad holds the columns of a
    score tile, read as the 8-bit operand of the next product, so that P needs no exchange between threads.
    """
    place = torch.arange(KEY_BLOCK, device=device)
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix, float64 [size, size], entries 1 and -1; size is a power of two.

    Its rows are orthogonal with squared length `size`, so (q H) . (k H) = size * q . k, and every channel of q H is a sum over
    all channels of q: what one channel has in excess is spread over all of them before the row is rounded.
    """
    bits = torch.arange(size, device=device)
    common = bits[:, None] & bits
    parity = torch.zeros_like(common)
    while size > 1:
        parity, common, size = parity ^ (common & 1), common >> 1, size // 2
    return 1.0 - 2.0 * parity.double()


def _round_to_int8(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product, rounded once: float64 holds it exactly, as the kernels' fused multiply-add does."""
    return (x.double() * factor.double()).round().to(torch.int8)


def quantise(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, fp8_values: bool
) -> QuantisedTensors:
    """Quantise one call's q [B, S_q, H, D] and k, v [B, S_k, H_kv, D]; the inputs are not modified.

    Numerics: rotation and mean in float64 (a last bit can move a number to the next integer), else float32; rounding to nearest,
    ties to even. Source: SageAttention (arXiv 2410.02367, section 4) with finer scales of Q; the rotation is FlashAttention-3's
    (arXiv 2407.08608, section 3.3) without its random signs; values are centred as in SageAttention2 (arXiv 2411.10958,
    section 3.3), but what comes back is the mean after rounding.
    """
    head_dim, len_q, len_k = q.shape[3], q.shape[1], k.shape[1]
    d_pad = padded_head(head_dim)
    extra_d = d_pad - head_dim
    pad = torch.nn.functional.pad
    rotation = hadamard(d_pad, q.device)
    q_, k_ = (pad(x.double().transpose(1, 2), (0, extra_d)) @ rotation for x in (q, k))
    is_sampled = torch.arange(len_k, device=k.device) // SAMPLE_ROWS % sample_step(len_k) == 0
    mean = k_[:, :, is_sampled].mean(2, keepdim=True).float()
    q_, k_ = q_.float(), k_.float() - mean
    group = q.shape[2] // k.shape[2]
    lse_shift = (q_ * mean.repeat_interleave(group, 1)).sum(-1) * (softmax_scale / d_pad)

    sign = -1.0 if softmax_scale < 0 else 1.0
    q_ = pad(q_, (0, 0, 0, -len_q % QUERY_TILE))
    largest = q_.abs().amax(-1).clamp_min(SCORE_FLOOR)
    q8 = _round_to_int8(q_, (INT8_MAX * sign / largest)[..., None])
    q_scale = (largest * (abs(softmax_scale) * LOG2_E / (INT8_MAX * d_pad))).clamp_min(SCALE_FLOOR)

    k_ = pad(k_, (0, 0, 0, -len_k % KEY_BLOCK))
    k_ = k_.view(*k_.shape[:2], -1, KEY_BLOCK, d_pad)
    largest = k_.abs().amax((-1, -2)).clamp_min(SCORE_FLOOR)
    k8 = _round_to_int8(k_, (INT8_MAX / largest)[..., None, None]).flatten(2, 3)
    k_scale = largest / INT8_MAX

    v8 = v_scale = v_rest = None
    if fp8_values:
        v_ = pad(v.transpose(1, 2), (0, extra_d))
        center = v_.mean(2, keepdim=True, dtype=torch.float64).float()
        centered = v_.float() - center
        largest = centered.abs().amax(2).clamp_min(VALUE_FLOOR)
        v_scale = (largest / E4M3_MAX).contiguous()
        v_ = (centered * v_scale.reciprocal()[:, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        v_rest = center[:, :, 0] + (centered - v_scale[:, :, None] * v_).mean(2, dtype=torch.float64).float()
        tiles = pad(v_, (0, 0, 0, -len_k % KEY_BLOCK)).view(*v_.shape[:2], -1, KEY_BLOCK, d_pad)
        tiles = tiles[:, :, :, key_order(v.device)]
        v8 = tiles.transpose(-1, -2).to(torch.float8_e4m3fn).contiguous()
    tensors = (q8, q_scale, k8, k_scale, v8, v_scale, v_rest, lse_shift)
    return QuantisedTensors(*(None if x is None else x.contiguous() for x in tensors))  # type: ignore[arg-type]


def dequantise_values(quantised: QuantisedTensors) -> torch.Tensor:
    """The e4m3 values, without their scale, float32 [B, H_kv, N_k * 64, D'], keys in their own order."""
    assert quantised.v8 is not None
    tiles = quantised.v8.float().transpose(-1, -2)
    return tiles[:, :, :, key_order(tiles.device).argsort()].flatten(2, 3)
