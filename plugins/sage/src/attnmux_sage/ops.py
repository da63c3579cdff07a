"""Quantised attention as a function of tensors: check, choose an engine, run. Known to torch.compile and CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse.index import BlockIndex
from attnmux_blocksparse.prepare import check_tensors, resolve_scale
from attnmux_sage import reference
from attnmux_sage.kernels import ENGINES, PV_TYPES, KernelRequest, choose_engine, default_pv, keys_per_step
from attnmux_sage.prepare import HEAD_SIZES, KEY_BLOCK, QUERY_TILE, quantise

__all__ = ["ENGINES", "PV_TYPES", "check_inputs", "emulate", "refuse_gradients", "sage_attention"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def sage_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    index: BlockIndex | None = None,
    pv: str | None = None,
    return_lse: bool = False,
    engine: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in 8 bits, over all keys or over listed key blocks. Inference only.

    Args:
        q: `[B, S_q, H, D]`, float16, bfloat16 or float32 (half types for the GPU engines), D 16 to 128 in steps of 8. Any
            strides with D contiguous; not modified.
        k: `[B, S_k, H_kv, D]`, dtype and device of q, likewise strided; H is a multiple of H_kv, and query head h reads
            key head `h // (H / H_kv)`.
        v: Like k.
        softmax_scale: Factor on the scores, finite; None = `D ** -0.5`.
        causal: Whether a query sees only keys up to its own position, the last query aligned with the last key.
        index: Key blocks of 64 for every block of 128 queries, without valid lengths; None = all keys. Excludes `causal`.
        pv: "fp8" multiplies weights and values in e4m3, "bf16" in the dtype of v, whichever it is. None = "fp8", and "bf16"
            on cards below sm_89, which have no e4m3.
        return_lse: Whether to return the log-sum-exp too.
        engine: "reference" (any device), "triton" (sm_80 on), "hopper" (sm_90), "official" (the packages sageattention 2.2
            and later or, with `index`, spas_sage_attn, after a numeric check). None takes the fastest of the first three. A
            named engine runs or raises.

    Returns:
        `[B, S_q, H, D]` in the dtype of q, contiguous; with `return_lse=True` also the LSE `[B, H, S_q]`, float32, natural
        logarithm. A query with nothing to attend has output 0 and LSE -inf.

    Raises:
        UnsupportedRequestError: Shapes, dtypes, devices, strides or numbers that do not fit; a tensor that requires a
            gradient; an engine that cannot serve the call.

    Numerics:
        Q with one INT8 scale per row, K minus its mean over a sample of keys with one per 64 keys, V minus its mean with one
        e4m3 scale per channel; scores, softmax and sums in float32, P V of 64 to 256 keys in an accumulator of their own. Same
        input, same bits. README.md has the measured accuracy.

    Source:
        SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958); README.md says where this differs.
    """
    check_inputs(q, k, v)
    scale = resolve_scale(softmax_scale, q.shape[3])
    _check_options(q, k, causal, index, pv, engine)
    refuse_gradients("sage_attention", q, k, v)
    blocks, counts, even_rows = (None, None, True) if index is None else (index.blocks, index.counts, index.even_rows)
    out, lse = torch.ops.attnmux_sage.forward(
        q, k, v, blocks, counts, even_rows, scale, causal, pv or "", return_lse, engine or ""
    )
    return (out, lse) if return_lse else out


def emulate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    blocks: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    pv: str = "fp8",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernels compute, step by step in plain PyTorch, for checked arguments; also for float64 tensors.

    Args:
        q: `[B, S_q, H, D]`.
        k: `[B, S_k, H_kv, D]`.
        v: `[B, S_k, H_kv, D]`.
        softmax_scale: Factor on the scores.
        causal: Whether a query sees only keys up to its own position.
        blocks: int32 `[B or 1, H or 1, N_q, K]`, the lists; None = all keys.
        counts: int32 `[B or 1, H or 1, N_q]`, entries of each list; None with `blocks`.
        pv: "fp8" or "bf16".

    Returns:
        `[B, S_q, H, D]` in the dtype of v, and the LSE `[B, H, S_q]`, float32.
    """
    quantised = quantise(q, k, v, softmax_scale=softmax_scale, fp8_values=pv == "fp8")
    step = keys_per_step(q.device, causal)
    return reference.attend(
        quantised, v, len_q=q.shape[1], blocks=blocks, counts=counts, causal=causal, keys_per_step=step
    )


def refuse_gradients(what: str, *tensors: torch.Tensor | None) -> None:
    """Raise UnsupportedRequestError if autograd would record the call: rounding to 8 bits has no gradient."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise UnsupportedRequestError(
            f"{what} computes no gradients, and a tensor of this call requires one; run it under torch.no_grad() or "
            "torch.inference_mode(). To train, use TORCH_SDPA or FLASH_ATTN, or SLA_ATTN in place of SAGE_SLA_ATTN: it has the "
            "same parameters"
        )


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Refuse tensors that do not fit together, naming the first."""
    check_tensors(q, k, v, dtypes=_DTYPES)
    if q.shape[3] not in HEAD_SIZES:
        raise UnsupportedRequestError(
            f"head_dim={q.shape[3]} is not supported; head sizes are {HEAD_SIZES[0]} to {HEAD_SIZES[-1]} in steps of "
            f"{HEAD_SIZES.step}; pad the head"
        )


def _check_options(
    q: torch.Tensor, k: torch.Tensor, causal: bool, index: BlockIndex | None, pv: str | None, engine: str | None
) -> None:
    if pv is not None and pv not in PV_TYPES:
        raise UnsupportedRequestError(f"pv={pv!r} is not known; expected one of {', '.join(PV_TYPES)}")
    if engine is not None and engine not in ENGINES:
        raise UnsupportedRequestError(f"engine={engine!r} is not known; engines are {', '.join(ENGINES)}")
    if index is None:
        return
    if not isinstance(index, BlockIndex):
        raise UnsupportedRequestError(f"index must be a BlockIndex; got {type(index).__name__}")
    if causal:
        raise UnsupportedRequestError("causal=True is given together with an index, which says what is attended to")
    if (index.block_q, index.block_k) != (QUERY_TILE, KEY_BLOCK):
        raise UnsupportedRequestError(
            f"index has blocks of {index.block_q} queries and {index.block_k} keys; supported: {QUERY_TILE} and {KEY_BLOCK}"
        )
    if index.q_lengths is not None or index.k_lengths is not None:
        raise UnsupportedRequestError("index has q_lengths or k_lengths; only whole blocks are supported")
    if index.blocks.device != q.device:
        raise UnsupportedRequestError(f"index is on {index.blocks.device}, q on {q.device}; build it on one device")
    batch, heads, num_query_blocks, _ = index.blocks.shape
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
        raise UnsupportedRequestError(
            f"index has {batch} batches and {heads} heads; needed: 1 or {q.shape[0]}, and 1 or {q.shape[2]}"
        )
    if num_query_blocks != -(-q.shape[1] // QUERY_TILE):
        raise UnsupportedRequestError(
            f"index lists {num_query_blocks} query blocks; {q.shape[1]} query tokens make {-(-q.shape[1] // QUERY_TILE)}"
        )
    # a plain number held by the index would tie a compiled graph to one length
    if not torch.compiler.is_compiling() and index.num_key_blocks != -(-k.shape[1] // KEY_BLOCK):
        raise UnsupportedRequestError(
            f"index is for {index.num_key_blocks} key blocks; {k.shape[1]} key tokens make {-(-k.shape[1] // KEY_BLOCK)}"
        )


@torch.library.custom_op("attnmux_sage::forward", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor | None,
    counts: torch.Tensor | None,
    even_rows: bool,
    softmax_scale: float,
    causal: bool,
    pv: str,
    needs_lse: bool,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    pv = pv or default_pv(q)
    chosen = choose_engine(engine, KernelRequest(q, k, v, pv, causal, blocks is not None, needs_lse, softmax_scale))
    if chosen == "reference":
        # An operator's body may run under autocast, of which the reference's products must not know.
        with torch.autocast(q.device.type, enabled=False):
            return emulate(q, k, v, softmax_scale=softmax_scale, causal=causal, blocks=blocks, counts=counts, pv=pv)
    if chosen == "official":
        from attnmux_sage.kernels.official import run_official

        return run_official(q, k, v, blocks, counts, softmax_scale=softmax_scale, causal=causal)
    from attnmux_sage.kernels import launch

    result: tuple[torch.Tensor, torch.Tensor] = launch.attention_forward(
        chosen, q, k, v, blocks, counts, even_rows=even_rows, softmax_scale=softmax_scale, causal=causal, pv=pv
    )
    return result


@_forward_op.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, len_q, heads, _head_dim = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(batch, heads, len_q, dtype=torch.float32)
