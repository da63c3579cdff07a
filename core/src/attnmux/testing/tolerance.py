"""The error rule: how far from a float64 oracle a result may be.

A result passes if its largest error is at most twice that of PyTorch's own attention in the same dtype (three times for
gradients) plus a band of a few eps, if the relative L2 error of gradients is at most 1e-2 in half precision, and if its
norm is within 0.5 % of the oracle's. Bounds are relative to the data, so a test holds no number of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch.nn import functional as F

__all__ = [
    "ErrorMeasure",
    "assert_close_to_oracle",
    "dense_attention_baseline",
    "dense_attention_oracle",
    "measure_error",
    "visible_keys",
]

ERROR_FACTOR = {"output": 2.0, "gradient": 3.0}
"""Largest error allowed, as a multiple of the error of PyTorch's own attention."""

EPS_BAND = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 32.0, torch.float64: 4096.0}
"""Width of the band in units of eps * max |oracle|. In half precision it covers the rounding of the result. In float32 it
covers another order of summation. In float64 the oracle is no more precise than what it judges, and another order of
summation under a softmax with scores in the hundreds shows; 4096 eps is 1e-12."""

RELATIVE_L2 = {torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-10}
"""Largest |error| / |oracle| in the L2 norm, of gradients. The error rule names 1e-2 for half precision; the other two
scale with eps, with room for cancellation."""

NORM_RATIO = 5e-3
"""Largest deviation of |result| / |oracle| from 1."""


@dataclass(frozen=True)
class ErrorMeasure:
    """Errors of one result.

    Attributes:
        largest: max |result - oracle|.
        largest_relative: The same over max |oracle|.
        relative_l2: |result - oracle| / |oracle| in the L2 norm.
        norm_deviation: | |result| / |oracle| - 1 |.
    """

    largest: float = 0.0
    largest_relative: float = 0.0
    relative_l2: float = 0.0
    norm_deviation: float = 0.0

    def worst(self, other: ErrorMeasure) -> ErrorMeasure:
        """Return the larger of each."""
        return ErrorMeasure(*(max(a, b) for a, b in zip(_astuple(self), _astuple(other), strict=True)))


def _astuple(measure: ErrorMeasure) -> tuple[float, float, float, float]:
    return (measure.largest, measure.largest_relative, measure.relative_l2, measure.norm_deviation)


def measure_error(result: torch.Tensor, oracle: torch.Tensor) -> ErrorMeasure:
    """Return the errors of `result` (any floating dtype and device) against `oracle` (float64, same shape)."""
    oracle = oracle.detach().double().cpu()
    error = result.detach().double().cpu() - oracle
    if oracle.numel() == 0:
        return ErrorMeasure()
    size, norm = oracle.abs().max().item(), oracle.norm().item()
    largest = error.abs().max().item()
    if norm == 0.0:
        return ErrorMeasure(largest)
    return ErrorMeasure(
        largest, largest / size, error.norm().item() / norm, abs((error + oracle).norm().item() / norm - 1.0)
    )


def assert_close_to_oracle(
    result: torch.Tensor,
    oracle: torch.Tensor,
    baseline: ErrorMeasure | torch.Tensor,
    *,
    kind: Literal["output", "gradient"] = "output",
    what: str = "output",
    dtype: torch.dtype | None = None,
    term_size: float = 0.0,
) -> None:
    """Raise AssertionError with both numbers unless `result` obeys the error rule.

    A limit that PyTorch itself misses on this data says nothing about a backend: relative L2 and norm are held to the
    rule's number or to `ERROR_FACTOR` times PyTorch's own deviation, whichever is larger.

    Args:
        result: What is judged; any shape, floating dtype and device.
        oracle: The truth in float64, same shape.
        baseline: PyTorch's result in the same dtype for the same data, or its errors from `measure_error`. Its largest
            error counts relative to max |oracle|, so it may be measured on another quantity of the same call.
        kind: Which factors apply.
        what: Name of the quantity, for the message.
        dtype: Sets the width of the band; None = that of `result`.
        term_size: Magnitude of the terms whose sum `result` is. It counts in place of max |oracle| where the oracle
            vanishes next to it: the gradient of q over a single key is a difference of equal numbers.
    """
    assert result.shape == oracle.shape, f"{what}: shape {list(result.shape)}, expected {list(oracle.shape)}"
    if bad := int((~result.detach().isfinite()).sum()):
        raise AssertionError(f"{what}: {bad} of {result.numel()} values are NaN or infinite; the oracle is finite")
    dtype = dtype or result.dtype
    if isinstance(baseline, torch.Tensor):
        baseline = measure_error(baseline, oracle)
    found = measure_error(result, oracle)
    factor, band = ERROR_FACTOR[kind], EPS_BAND[dtype] * torch.finfo(dtype).eps
    size = oracle.detach().abs().max().item() if oracle.numel() else 0.0
    vanishes = size <= band * term_size
    limit = factor * baseline.largest_relative * size + band * (term_size if vanishes else size)
    problems = []
    if found.largest > limit:
        at = _worst_index(result, oracle)
        problems.append(
            f"largest error {found.largest:.3e} at {at} (result {result[at].item():.6g}, oracle {oracle[at].item():.6g}), "
            f"allowed {limit:.3e}; PyTorch's own attention in {dtype} is off by {baseline.largest_relative * size:.3e}"
        )
    if not vanishes:
        allowed = max(RELATIVE_L2[dtype], factor * baseline.relative_l2)
        if kind == "gradient" and found.relative_l2 > allowed:
            problems.append(
                f"relative L2 error {found.relative_l2:.3e}, allowed {allowed:.3e}; PyTorch's own {baseline.relative_l2:.3e}"
            )
        allowed = max(NORM_RATIO, factor * baseline.norm_deviation)
        if found.norm_deviation > allowed:
            problems.append(
                f"norm off by {found.norm_deviation:.3e} of the oracle's, allowed {allowed:.3e}; PyTorch's own "
                f"{baseline.norm_deviation:.3e}"
            )
    if problems:
        raise AssertionError(f"{what} {list(result.shape)} {result.dtype}: " + "; ".join(problems))


def _worst_index(result: torch.Tensor, oracle: torch.Tensor) -> tuple[int, ...]:
    flat = int((result.detach().double().cpu() - oracle.detach().double().cpu()).abs().argmax())
    index = []
    for extent in reversed(result.shape):
        flat, place = divmod(flat, extent)
        index.append(place)
    return tuple(reversed(index))


def visible_keys(
    length_q: int, length_k: int, *, causal: bool, attn_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return which keys a query may attend: bool, broadcastable to `[B, H, S_q, S_k]`.

    Args:
        length_q: Tokens of q.
        length_k: Tokens of k.
        causal: Whether query i sees keys up to i + `length_k` - `length_q`: the last ones are aligned.
        attn_mask: Bool (True = attend) or additive (-inf = do not), broadcastable to `[B, H, S_q, S_k]`, or None.
        device: Where the result lives.
    """
    visible = torch.ones(length_q, length_k, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril(length_k - length_q)
    if attn_mask is None:
        return visible
    return visible & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != float("-inf"))


@overload
def dense_attention_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    attn_mask: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def dense_attention_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    attn_mask: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def dense_attention_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Return softmax attention in float64, differentiable, written for reading.

    Args:
        q: `[B, S_q, H, D]`, any floating dtype, device and strides.
        k: `[B, S_k, H_kv, D]`, H a multiple of H_kv: query head h reads key head h // (H / H_kv).
        v: `[B, S_k, H_kv, D_v]`.
        softmax_scale: Factor on the scores; None = `D ** -0.5`.
        causal: Whether a query sees only keys up to its own position, the last query aligned with the last key.
        attn_mask: Bool (True = attend) or additive floating point, broadcastable to `[B, H, S_q, S_k]`, or None.
        return_lse: Whether to return the log-sum-exp too.

    Returns:
        `[B, S_q, H, D_v]` float64, zeros for a query with nothing to attend; with `return_lse=True` also `[B, H, S_q]`
        float64, natural logarithm, -inf for such a query.
    """
    length_q, length_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    empty = None
    if causal or attn_mask is not None:
        visible = visible_keys(length_q, length_k, causal=causal, attn_mask=attn_mask, device=q.device)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            scores = scores + attn_mask.double()
        # a finite filler in empty rows keeps NaN out of the gradients
        empty = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, float("-inf")).masked_fill(empty, 0.0)
    output = scores.softmax(-1) @ v
    output = (output if empty is None else output.masked_fill(empty, 0.0)).transpose(1, 2)
    if not return_lse:
        return output
    lse = scores.logsumexp(-1)
    return output, lse if empty is None else lse.masked_fill(empty.squeeze(-1), float("-inf"))


def dense_attention_baseline(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return PyTorch's own attention in the dtype of q, on the arguments and layout of `dense_attention_oracle`."""
    length_q, length_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if attn_mask is None and not causal:
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)
    visible = visible_keys(length_q, length_k, causal=causal, attn_mask=attn_mask, device=q.device)
    empty = ~visible.any(-1, keepdim=True)
    # torch's kernels differ in what they give for a row with nothing to attend; here it attends to all and is cut after
    mask = visible | empty
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        mask = attn_mask.to(q.dtype).masked_fill(~visible, float("-inf")).masked_fill(empty, 0.0)
    mask = mask.expand(q.shape[0], q.shape[1], length_q, length_k)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
    return output.masked_fill(empty, 0.0).transpose(1, 2)
