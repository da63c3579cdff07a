"""Video Mixture-of-Block Attention by its definition, in plain PyTorch, on any device.

Per sample and head, with the tokens in chunk order, k'_c the mean of the keys of chunk c and C chunks:

    gate[c, s]  = q_s . k'_c
    kept(s)     = the chunk of s itself, and those that the choice adds (`choose_chunks`)
    out_s       = sum_j softmax_j(scale * q_s . k_j) v_j             over the tokens j of the chunks kept(s)

The choice carries no gradient. Half types compute in float32, float32 and float64 in float64: in float32, scores in the hundreds
are off by 1e-4, and so is then the weight of every key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnmux_vmoba.prepare import (
    ChunkGrid,
    Selection,
    from_chunk_order,
    pack_bits,
    self_chunks,
    to_chunk_order,
    unpack_bits,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["attention_backward", "attention_forward", "choose_chunks", "compute_dtype", "gate_chunks", "select_bits"]

# keeps a share of no gates at all at 0, as published
_EPS = 1e-6
# queries whose scores are in memory at once
_ROWS = 2048


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of means, gates, scores, softmax, log-sum-exps and sums for inputs of `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


def _heads_first(x: torch.Tensor, chunks: ChunkGrid, heads: int) -> torch.Tensor:
    """[B, S, H_kv, D] in raster order -> [B, H, S, D] in chunk order, in the compute dtype, every query head its own."""
    ordered = to_chunk_order(x.to(compute_dtype(x.dtype)), chunks).transpose(1, 2)
    return ordered.repeat_interleave(heads // x.shape[2], 1)


def gate_chunks(q: torch.Tensor, k: torch.Tensor, chunks: ChunkGrid) -> torch.Tensor:
    """Return the gates `[B, H, C, S]`, tokens in chunk order: each query against the mean key of each chunk, unscaled.

    Args:
        q: `[B, S, H, D]` in raster order, any strides.
        k: `[B, S, H_kv, D]`, likewise.
        chunks: The chunks; the mean of a short last one is over the tokens it has.
    """
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = _heads_first(q, chunks, q.shape[2]), _heads_first(k, chunks, q.shape[2])
        means = torch.stack([x.mean(2) for x in torch.split(keys, chunks.chunk_tokens, 2)], 2)  # [B, H, C, D]
        return means @ queries.transpose(-1, -2)


def choose_chunks(gates: torch.Tensor, own: torch.Tensor, how: Selection) -> torch.Tensor:
    """Return which chunks every query attends to, bool `[B, H, C, S]`.

    Args:
        gates: `[B, H, C, S]`.
        own: Each token's own chunk, bool `[C, S]`; always chosen.
        how: Mode, scope and budget. Ties go to the lower index: of chunks under query_head; of (chunk, token) under
            head_global, (chunk, head, token) under overall, (head, token) under block.

    The entries of a scope, without the own ones, are ordered by falling gate; a prefix is kept:

        topk        (topk - 1) entries for every query of the scope
        threshold   g = (gate - min) / (max - min) over the scope, 0 where all are equal; an entry is kept while
                    sum(own g) + sum(g before it) < threshold * (sum(g) + 1e-6). So 0 adds nothing, and 1 keeps everything.

    A scope that holds a NaN keeps everything under a threshold, and NaN ranks first under topk, so that it shows in the output.
    Sums are float64.
    """
    B, H, C, S = gates.shape
    own = own.expand(B, H, C, S)

    def by_scope(x: torch.Tensor) -> torch.Tensor:
        """[B, H, C, S] -> [..., entries of a scope], in the order in which ties are broken."""
        if how.scope == "query_head":
            return x.transpose(2, 3)
        if how.scope == "head_global":
            return x.reshape(B, H, 1, C * S)
        x = x.transpose(1, 2)
        return x.reshape(B, 1, 1, C * H * S) if how.scope == "overall" else x.reshape(B, C, 1, H * S)

    g, is_own = by_scope(gates), by_scope(own)
    entries = g.shape[-1]
    # a stable sort keeps equal gates in the order of their index
    best_first = g.masked_fill(is_own, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    if how.mode == "topk":
        budget = (min(how.topk, C) - 1) * (entries // C)
        kept = torch.arange(entries, device=g.device) < budget
        kept = kept.expand(best_first.shape)
    else:
        kept = _prefix_by_share(g.double(), is_own, best_first, how)
    chosen: torch.Tensor = torch.zeros_like(is_own).scatter(-1, best_first, kept) | is_own
    if how.scope == "query_head":
        return chosen.transpose(2, 3)
    if how.scope == "head_global":
        return chosen.reshape(B, H, C, S)
    return chosen.reshape(B, C, H, S).transpose(1, 2)


def _prefix_by_share(g: torch.Tensor, is_own: torch.Tensor, best_first: torch.Tensor, how: Selection) -> torch.Tensor:
    """Whether each entry, in the order `best_first`, is kept by the threshold."""
    least, most = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    g = torch.where(most == least, torch.zeros_like(g), (g - least) / (most - least))
    total = g.sum(-1, keepdim=True) + _EPS
    limit = (how.threshold * total - (g * is_own).sum(-1, keepdim=True)).clamp(min=0.0)
    if how.threshold >= 1.0:
        limit = torch.full_like(limit, float("inf"))
    others = g.masked_fill(is_own, 0.0).gather(-1, best_first)
    before = others.cumsum(-1) - others
    # not (before >= limit): a NaN keeps everything
    kept = ~(before >= limit)
    if how.keeps_one:
        kept[..., 0] = True
    return kept


def select_bits(q: torch.Tensor, k: torch.Tensor, chunks: ChunkGrid, how: Selection) -> torch.Tensor:
    """Return the choice as packed bits, int32 `[B, H, ceil(C / 32), S]`; see `prepare.pack_bits`."""
    return pack_bits(choose_chunks(gate_chunks(q, k, chunks), self_chunks(chunks, q.device), how))


def _parts(chosen: torch.Tensor, chunks: ChunkGrid) -> Iterator[tuple[int, int, slice, torch.Tensor]]:
    """Yield (sample, head, tokens of a chunk, queries that chose it) for every chunk, in pieces."""
    B, H, C, S = chosen.shape
    for b in range(B):
        for h in range(H):
            for c in range(C):
                rows = chosen[b, h, c].nonzero()[:, 0]
                tokens = slice(c * chunks.chunk_tokens, min((c + 1) * chunks.chunk_tokens, S))
                for start in range(0, len(rows), _ROWS):
                    yield b, h, tokens, rows[start : start + _ROWS]


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, words: torch.Tensor, chunks: ChunkGrid, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the chosen chunks, one at a time, with a running softmax. Reads the choice on the host.

    Args:
        q: `[B, S, H, D]` in raster order, any strides.
        k: `[B, S, H_kv, D]`, likewise.
        v: Like k.
        words: The choice, packed.
        chunks: The chunks.
        scale: Factor on the scores.

    Returns:
        out `[B, S, H, D]` in raster order and the dtype of q, and lse `[B, H, S]` in chunk order, natural log, in the
        compute dtype.
    """
    queries, keys, values = (_heads_first(x, chunks, q.shape[2]) for x in (q, k, v))
    peak = torch.full(queries.shape[:3], float("-inf"), dtype=queries.dtype, device=q.device)
    weight, out = torch.zeros_like(peak), torch.zeros_like(queries)
    for b, h, tokens, rows in _parts(unpack_bits(words, chunks.num_chunks), chunks):
        scores = queries[b, h, rows] @ keys[b, h, tokens].T * scale
        new_peak = torch.maximum(peak[b, h, rows], scores.amax(-1))
        shrink, p = (peak[b, h, rows] - new_peak).exp(), (scores - new_peak[:, None]).exp()
        out[b, h, rows] = out[b, h, rows] * shrink[:, None] + p @ values[b, h, tokens]
        weight[b, h, rows] = weight[b, h, rows] * shrink + p.sum(-1)
        peak[b, h, rows] = new_peak
    out = from_chunk_order((out / weight[..., None]).transpose(1, 2), chunks)
    return out.to(q.dtype).contiguous(), peak + weight.log()


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    words: torch.Tensor,
    chunks: ChunkGrid,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_forward` in closed form, in the shapes and dtypes of q, k and v.

    With P = exp(scale Q K^T - lse): dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q.
    """
    heads = q.shape[2]
    queries, keys, values, douts, outs = (_heads_first(x, chunks, heads) for x in (q, k, v, dout, out))
    delta, lse = (douts * outs).sum(-1), lse.to(queries.dtype)
    dq, dk, dv = (torch.zeros_like(queries) for _ in range(3))
    for b, h, tokens, rows in _parts(unpack_bits(words, chunks.num_chunks), chunks):
        p = (queries[b, h, rows] @ keys[b, h, tokens].T * scale - lse[b, h, rows, None]).exp()
        dp = douts[b, h, rows] @ values[b, h, tokens].T
        ds = p * (dp - delta[b, h, rows, None]) * scale
        dv[b, h, tokens] += p.T @ douts[b, h, rows]
        dk[b, h, tokens] += ds.T @ queries[b, h, rows]
        dq[b, h, rows] += ds @ keys[b, h, tokens]

    def finish(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Sum over the query heads of each key head, and back to raster order [B, S, H_kv, D]."""
        grouped = x.reshape(x.shape[0], like.shape[2], -1, *x.shape[2:]).sum(2).transpose(1, 2)
        return from_chunk_order(grouped, chunks).to(like.dtype).contiguous()

    return finish(dq, q), finish(dk, k), finish(dv, v)
