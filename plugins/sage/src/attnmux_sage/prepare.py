"""Quantisation: what the 8-bit tensors are, and how plain PyTorch makes them (the kernels make the same)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634
INT8_MAX = 127.0
E4M3_MAX = 448.0

QUERY_TILE = 128
"""Rows of q8 come in multiples of this."""
KEY_BLOCK = 64
"""Keys that share one scale of K, and one transposed tile of V."""

# Below these sizes a tensor counts as zero. They keep every product of two scales a normal float32, so that a score of -inf
# stays -inf; V needs only that 448 / maximum is finite.
SCORE_FLOOR = 1e-12
SCALE_FLOOR = 1e-20
VALUE_FLOOR = 1e-30


@dataclass(frozen=True)
class QuantisedTensors:
    """One call's tensors in 8 bits, heads first, the head padded with zeros to D' = 64 or 128.

    q8: int8 [B, H, S_q', D'], S_q' = S_q rounded up to 128; rows beyond S_q are zero.
    q_scale: float32 [B, H, S_q'], one for each row, |softmax_scale| * log2(e) included (its sign is in q8).
    k8: int8 [B, H_kv, N_k * 64, D'], keys minus their mean over the sequence; keys beyond S_k are zero.
    k_scale: float32 [B, H_kv, N_k], one for 64 keys.
    v8: float8_e4m3fn [B, H_kv, N_k, D', 64]: each block of 64 keys transposed, its keys in the order of `key_order`; None where
        P V is computed in the type of v.
    v_scale: float32 [B, H_kv, D'], one for each channel; None with v8.
    lse_shift: float32 [B, H, S_q]: softmax_scale * q . mean(K), what smoothing took off every score of a row.
    """

    q8: torch.Tensor
    q_scale: torch.Tensor
    k8: torch.Tensor
    k_scale: torch.Tensor
    v8: torch.Tensor | None
    v_scale: torch.Tensor | None
    lse_shift: torch.Tensor


def padded_head(head_dim: int) -> int:
    """D': 64 or 128."""
    return 64 if head_dim <= 64 else 128


def key_order(device: torch.device) -> torch.Tensor:
    """Key stored at each of the 64 places of a tile of v8, int64 [64].

    Within 16 keys, place 4 t + 2 h + e holds key 8 h + 2 t + e: the order in which thread t of a quad holds the columns of a
    score tile, read as the 8-bit operand of the next product, so that P needs no exchange between threads.
    """
    place = torch.arange(KEY_BLOCK, device=device)
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


def quantise(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, fp8_values: bool
) -> QuantisedTensors:
    """Quantise one call's q [B, S_q, H, D] and k, v [B, S_k, H_kv, D]; the inputs are not modified.

    Numerics: float32 throughout, rounding to nearest, ties to even. Source: SageAttention (arXiv 2410.02367, section 4), with
    finer scales of Q and a K that is smoothed by its exact mean.
    """
    head_dim, len_q, len_k = q.shape[3], q.shape[1], k.shape[1]
    extra_d = padded_head(head_dim) - head_dim
    pad = torch.nn.functional.pad
    q_ = q.float().transpose(1, 2)
    k_ = k.float().transpose(1, 2)
    mean = k_.mean(2, keepdim=True)
    group = q.shape[2] // k.shape[2]
    lse_shift = (q_ * mean.repeat_interleave(group, 1)).sum(-1) * softmax_scale

    sign = -1.0 if softmax_scale < 0 else 1.0
    q_ = pad(q_, (0, extra_d, 0, -len_q % QUERY_TILE))
    largest = q_.abs().amax(-1).clamp_min(SCORE_FLOOR)
    q8 = (q_ * (INT8_MAX * sign / largest)[..., None]).round().to(torch.int8)
    q_scale = (largest * (abs(softmax_scale) * LOG2_E / INT8_MAX)).clamp_min(SCALE_FLOOR)

    k_ = pad(k_ - mean, (0, extra_d, 0, -len_k % KEY_BLOCK)).unflatten(2, (-1, KEY_BLOCK))
    largest = k_.abs().amax((-1, -2)).clamp_min(SCORE_FLOOR)
    k8 = (k_ * (INT8_MAX / largest)[..., None, None]).round().to(torch.int8).flatten(2, 3)
    k_scale = largest / INT8_MAX

    v8 = v_scale = None
    if fp8_values:
        v_ = pad(v.float().transpose(1, 2), (0, extra_d, 0, -len_k % KEY_BLOCK))
        largest = v_.abs().amax(2).clamp_min(VALUE_FLOOR)
        v_scale = largest / E4M3_MAX
        v_ = (v_ * v_scale.reciprocal()[:, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
        tiles = v_.to(torch.float8_e4m3fn).float().unflatten(2, (-1, KEY_BLOCK))[:, :, :, key_order(v.device)]
        v8 = tiles.transpose(-1, -2).to(torch.float8_e4m3fn).contiguous()
    return QuantisedTensors(q8, q_scale, k8, k_scale, v8, v_scale, lse_shift)


def dequantise_values(quantised: QuantisedTensors) -> torch.Tensor:
    """The e4m3 values, without their scale, float32 [B, H_kv, N_k * 64, D'], keys in their own order."""
    assert quantised.v8 is not None
    tiles = quantised.v8.float().transpose(-1, -2)
    return tiles[:, :, :, key_order(tiles.device).argsort()].flatten(2, 3)
