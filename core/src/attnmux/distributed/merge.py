"""Attention over all keys from attention over parts of them."""

from __future__ import annotations

import torch

__all__ = ["merge_part"]


def merge_part(
    merged: tuple[torch.Tensor, torch.Tensor] | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp over the keys merged so far and those of one more part.

    Args:
        merged: What an earlier call returned; None before the first.
        output: `[B, S_q, H, D]`, attention over the part's keys.
        lse: `[B, H, S_q]`, its log-sum-exp; -inf for a query that sees no key of the part.
        dtype: Of the output, if this is the last part; None = what it is summed in.

    Returns:
        `[B, S_q, H, D]` and `[B, H, S_q]`, summed in float32, or float64 for a part in float64. A first part is returned as it is.

    Numerics: the sum of `exp(lse_i - lse) * output_i`, rounded once; a query that no part shows a key gives 0 and -inf.
    """
    if merged is None:
        return output, lse
    so_far, lse_so_far = merged
    sums = torch.promote_types(output.dtype, torch.float32)
    lse_so_far, lse = lse_so_far.to(sums), lse.to(sums)
    total = torch.logaddexp(lse_so_far, lse)
    # where both are -inf, both weights are to be 0 and not NaN
    shift = total.masked_fill(total == float("-inf"), 0.0)
    old, new = (torch.exp(x - shift).transpose(1, 2)[..., None] for x in (lse_so_far, lse))
    # half precision is read as it is, and written once
    scaled = so_far * old
    into = scaled if dtype is None else torch.empty(scaled.shape, dtype=dtype, device=scaled.device)
    return torch.addcmul(scaled, output, new, out=into), total
