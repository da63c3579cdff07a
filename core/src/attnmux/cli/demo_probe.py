"""Finds out which keys a query attends to in any backend, without looking inside it.

Attention is linear in v: out[i, c] = sum_j w[i, j] v[j, c]. So the gradient of out[i, c] with respect to v[:, c] is the row
of weights w[i, :], exactly, and since channels do not mix, one backward pass yields the rows of as many queries as a head
has channels. A backend without backward is asked the other way round: v carries indicators, one token per channel.

The weights of far keys underflow to 0 although the keys are kept. The scale is therefore turned down by a power of two:
every kept key gets a weight that is clearly not 0, and scores keep their order to the last bit, so that a backend that
keeps the best keeps the same ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnmux.layers import LocalAttention

if TYPE_CHECKING:
    from attnmux.backend import AttentionMetadata
    from attnmux.spec import BackendSpec
    from attnmux.testing.clip import ClipTokens

__all__ = ["dense_weights", "find_kept_keys", "probe_queries"]

_FLATTENING = 2.0**-10
# seconds that the slower way of probing may take
_INDICATOR_BUDGET_S = 15.0


def probe_queries(tokens: ClipTokens, first: int) -> list[int]:
    """Return the queries to look at: the given one, and others spread evenly, one per channel of a head."""
    length = tokens.q.shape[1]
    others = torch.linspace(0, length - 1, min(tokens.head_size, length)).long().tolist()
    return list(dict.fromkeys([first, *others]))[: tokens.head_size]


def find_kept_keys(
    spec: BackendSpec,
    tokens: ClipTokens,
    metadata: AttentionMetadata,
    queries: list[int],
    *,
    seconds_per_run: float,
) -> torch.Tensor | None:
    """Return which keys each query attends to.

    Args:
        spec: The backend.
        tokens: On the device and in the dtype to run in.
        metadata: Of the backend.
        queries: Raster positions, at most one per channel of a head.
        seconds_per_run: Time of one forward pass.

    Returns:
        Bool `[heads, queries, S]`, where heads is 1 or all; None if the backend has no backward and indicators would take
        too long.
    """
    layer = LocalAttention(
        tokens.num_heads,
        tokens.head_size,
        softmax_scale=tokens.softmax_scale * _FLATTENING,
        backend=spec.name,
        dtype=tokens.q.dtype,
    ).to(tokens.q.device)
    if spec.capabilities.backward:
        return _by_gradient(layer, tokens, metadata, queries)
    passes = tokens.q.shape[1] / (tokens.num_heads * tokens.head_size)
    if passes * seconds_per_run > _INDICATOR_BUDGET_S:
        return None
    return _by_indicators(layer, tokens, metadata, queries)


def dense_weights(tokens: ClipTokens, query: int) -> torch.Tensor:
    """Return the softmax weights `[S]` of one query of the first head over all keys, float32 on the CPU."""
    q, k = (x[0, :, 0].float().cpu() for x in (tokens.q, tokens.k))
    return torch.softmax(tokens.softmax_scale * (k @ q[query]), dim=0)


def _by_gradient(
    layer: LocalAttention, tokens: ClipTokens, metadata: AttentionMetadata, queries: list[int]
) -> torch.Tensor:
    value = torch.zeros_like(tokens.v).requires_grad_()
    with torch.enable_grad():
        output = layer(tokens.q, tokens.k, value, attn_metadata=metadata)
    one_query_per_channel = torch.zeros_like(output)
    for channel, query in enumerate(queries):
        one_query_per_channel[0, query, :, channel] = 1.0
    (weights,) = torch.autograd.grad(output, value, one_query_per_channel)  # [1, S, H, D]
    return weights[0, :, :, : len(queries)].permute(1, 2, 0) != 0


@torch.no_grad()
def _by_indicators(
    layer: LocalAttention, tokens: ClipTokens, metadata: AttentionMetadata, queries: list[int]
) -> torch.Tensor:
    length, heads, channels = tokens.q.shape[1:]
    # every head gets the first head's q and k, so that each of its channels can carry a token of its own
    q, k = (x[:, :, :1].expand(-1, -1, heads, -1).contiguous() for x in (tokens.q, tokens.k))
    kept = torch.zeros(1, len(queries), length, dtype=torch.bool, device=q.device)
    for start in range(0, length, heads * channels):
        chosen = torch.arange(start, min(start + heads * channels, length), device=q.device)
        value = torch.zeros_like(tokens.v)
        value[0].flatten(1)[chosen, chosen - start] = 1.0
        weights = layer(q, k, value, attn_metadata=metadata)[0, queries].flatten(1)  # [queries, H * D]
        kept[0, :, chosen] = weights[:, : len(chosen)] != 0
    return kept
