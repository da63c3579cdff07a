"""Run one engine: allocate what it writes and call its kernels in order. Imported with triton, on first use."""

from __future__ import annotations

import torch
import triton

from attnmux_blocksparse.kernels import backward, forward
from attnmux_blocksparse.kernels.arguments import IndexTensors, tma_reason
from attnmux_blocksparse.kernels.configs import HOPPER_DQ, HOPPER_FORWARD, TritonConfigs, triton_configs


def _configs(q: torch.Tensor, *streamed: torch.Tensor) -> TritonConfigs:
    """The tuning row for these tensors."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    tma_ok = not any(tma_reason("", x) for x in (q, *streamed))
    return triton_configs(triton.next_power_of_2(q.shape[3]), capability, tma_ok)


def attention_forward(engine: str, q, k, v, index: IndexTensors, softmax_scale: float, *, out=None):
    """The output [B, S_q, H, D] in the type of q and the log-sum-exp [B, H, S_q] in float32, both contiguous.

    `out`, where given, is written to instead, with any strides that TMA can address. With query blocks of 128 and more it may
    be q itself: every program reads its rows of q before it writes the same rows of the output.
    """
    batch, len_q, heads, head_dim = q.shape
    if out is None:
        out = torch.empty(batch, len_q, heads, head_dim, device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, len_q, device=q.device, dtype=torch.float32)
    with torch.cuda.device_of(q):
        if engine == "fa4":
            from attnmux_blocksparse.kernels.fa4 import launch_fa4_forward

            launch_fa4_forward(q, k, v, out, lse, index, softmax_scale=softmax_scale)
        elif engine == "hopper" and (head_dim, min(index.block_q, 128)) in HOPPER_FORWARD:
            from attnmux_blocksparse.kernels.hopper_forward import launch_hopper_forward

            launch_hopper_forward(q, k, v, out, lse, index, softmax_scale=softmax_scale)
        else:
            config = _configs(q, k, v).forward
            forward.launch_forward(q, k, v, out, lse, index, softmax_scale=softmax_scale, config=config)
    return out, lse


def attention_backward(engine: str, dout, dlse, q, k, v, out, lse, index: IndexTensors, softmax_scale: float):
    """The gradients dq, dk, dv, contiguous, in the types of q, k, v."""
    # A gradient may be an expanded view (that of a sum, say), which no kernel streams well.
    if dout.stride(3) != 1 or tma_reason("dout", dout):
        dout = dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    if engine == "fa4":
        from attnmux_blocksparse.kernels.fa4 import launch_fa4_backward

        with torch.cuda.device_of(q):
            launch_fa4_backward(q, k, v, out, dout, lse, dlse, dq, dk, dv, index, softmax_scale=softmax_scale)
        return dq, dk, dv
    lse2, delta = backward.launch_stats(out, dout, lse, dlse)
    attention_gradients(engine, dout, lse2, delta, q, k, v, dq, dk, dv, index, softmax_scale)
    return dq, dk, dv


def attention_gradients(
    engine: str, dout, lse2, delta, q, k, v, dq, dk, dv, index: IndexTensors, softmax_scale: float
) -> None:
    """Fill dq, dk and dv from the statistics of the rows; dq may be q itself, as in `attention_forward`.

    Args:
        engine: "triton" or "hopper".
        dout: [B, S_q, H, D], with strides that TMA can address.
        lse2: float32 [B, H, S_pad], S_pad a multiple of 256: the log-sum-exp in base 2, +inf for an empty row.
        delta: likewise: rowsum(dO * O) - dLSE, finite.
        q: as in the forward.
        k: likewise.
        v: likewise.
        dq: in the shape of q; written.
        dk: in the shape of k; written.
        dv: likewise.
        index: with the transposed lists.
        softmax_scale: factor on the scores.
    """
    # Both on one stream: with dQ on a second stream the backward took between 1.6 % less and 2.3 % more time.
    key_gradients(dout, lse2, delta, q, k, v, dk, dv, index, softmax_scale)
    query_gradients(engine, dout, lse2, delta, q, k, v, dq, index, softmax_scale)


def key_gradients(dout, lse2, delta, q, k, v, dk, dv, index: IndexTensors, softmax_scale: float) -> None:
    """The half of `attention_gradients` that fills dk and dv.

    With a raster of tiles, q and dout lie tile after tile here: they are read many times.
    """
    with torch.cuda.device_of(q):
        config = _configs(q, k, v, dout).dkdv
        backward.launch_dkdv(q, k, v, dout, lse2, delta, dk, dv, index, softmax_scale=softmax_scale, config=config)


def query_gradients(engine: str, dout, lse2, delta, q, k, v, dq, index: IndexTensors, softmax_scale: float) -> None:
    """The half of `attention_gradients` that fills dq."""
    with torch.cuda.device_of(q):
        if engine == "hopper" and (q.shape[3], min(index.block_q, 128)) in HOPPER_DQ:
            from attnmux_blocksparse.kernels.hopper_backward import launch_hopper_dq

            launch_hopper_dq(q, k, v, dout, lse2, delta, dq, index, softmax_scale=softmax_scale)
        else:
            config = _configs(q, k, v, dout).dq
            backward.launch_dq(q, k, v, dout, lse2, delta, dq, index, softmax_scale=softmax_scale, config=config)
