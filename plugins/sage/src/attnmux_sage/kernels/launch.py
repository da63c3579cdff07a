"""Run one GPU engine: quantise, allocate what is written, launch. Imported with triton, on first use."""

from __future__ import annotations

import torch

from attnmux_sage.kernels.forward import launch_triton_forward
from attnmux_sage.kernels.quantise import launch_quantise, launch_quantise_pooling


def attention_forward(
    engine: str, q, k, v, blocks, counts, *, even_rows: bool, softmax_scale: float, causal: bool, pv: str
):
    """The output [B, S_q, H, D] in the type of q and the log-sum-exp [B, H, S_q] in float32, both contiguous."""
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device, dtype=torch.float32)
    with torch.cuda.device_of(q):
        quantised = launch_quantise(q, k, v, softmax_scale=softmax_scale, fp8_values=pv == "fp8")
    launch_attention(engine, quantised, v, out, lse, blocks, counts, even_rows=even_rows, causal=causal)
    return out, lse


def quantise_pooling(q, k, v, pooled_k, state, range_v, *, softmax_scale: float, pv: str):
    """The 8-bit tensors without lse_shift, and the pooled queries; see `quantise.launch_quantise_pooling`."""
    with torch.cuda.device_of(q):
        return launch_quantise_pooling(
            q, k, v, pooled_k, state, range_v, softmax_scale=softmax_scale, fp8_values=pv == "fp8"
        )


def launch_attention(
    engine: str, quantised, v, out, lse, blocks, counts, *, even_rows: bool, causal: bool = False
) -> None:
    """Fill out [B, S_q, H, D] and, unless it is None, lse [B, H, S_q]."""
    with torch.cuda.device_of(v):
        if engine == "hopper":
            from attnmux_sage.kernels.hopper_forward import launch_hopper_forward

            launch_hopper_forward(quantised, v, out, lse, blocks=blocks, counts=counts, even_rows=even_rows)
        else:
            launch_triton_forward(quantised, v, out, lse, blocks=blocks, counts=counts, causal=causal)
