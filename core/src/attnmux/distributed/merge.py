"""Attention over all keys from attention over parts of them."""

from __future__ import annotations

import torch

__all__ = ["merge_part"]


def merge_part(
    merged: tuple[torch.Tensor, torch.Tensor] | None, output: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp over the keys merged so far and those of one more part.

    Args:
        merged: What an earlier call returned, which is overwritten; None before the first.
        output: `[B, S_q, H, D]`, attention over the part's keys.
        lse: `[B, H, S_q]`, its log-sum-exp; -inf for a query that sees no key of the part.

    Returns:
        `[B, S_q, H, D]` and `[B, H, S_q]`: float32, or float64 for a part in float64.

    Numerics: the sum of `exp(lse_i - lse) * output_i`, in float32; a query that no part shows a key gives 0 and -inf.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    if merged is None:
        return output.to(dtype, copy=True), lse.to(dtype)
    so_far, lse_so_far = merged
    total = torch.logaddexp(lse_so_far, lse.to(dtype))
    # where both are -inf, both weights are to be 0 and not NaN
    shift = total.masked_fill(total == float("-inf"), 0.0)
    old, new = (torch.exp(x - shift).transpose(1, 2)[..., None] for x in (lse_so_far, lse.to(dtype)))
    return so_far.mul_(old).addcmul_(output.to(dtype), new), total
