"""The operator: checks its arguments, then computes block by block, without an [S, S] matrix."""

import torch
from torch.nn import functional as F

from attnmux import UnsupportedRequestError


def window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int, softmax_scale: float
) -> torch.Tensor:
    """Return softmax attention of every query over the keys at most `window` positions away.

    Args:
        q, k, v: `[B, S, H, D]`, any strides.
        window: Reach to either side, in tokens, >= 1.
        softmax_scale: Factor on the scores.

    Raises:
        UnsupportedRequestError: The keys are not as long as the queries.
    """
    length = q.shape[1]
    if k.shape[1] != length:
        raise UnsupportedRequestError(f"a window needs keys at the queries' positions: S_q={length}, S_k={k.shape[1]}")
    tail = -length % window
    q, k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, tail)).unflatten(2, (-1, window)) for x in (q, k, v))
    # [B, H, blocks, 3 * window, D]: the block of every query and its two neighbours
    k, v = (
        torch.cat([F.pad(x, (0, 0, 0, 0, 1, 1))[:, :, i : i + x.shape[2]] for i in range(3)], dim=3) for x in (k, v)
    )
    block = torch.arange(q.shape[2], device=q.device)[:, None] * window
    rows = block + torch.arange(window, device=q.device)
    keys = block - window + torch.arange(3 * window, device=q.device)
    near = (rows[..., None] - keys[..., None, :]).abs() <= window
    visible = near & (keys >= 0)[:, None] & (keys < length)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=softmax_scale)
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2)
