"""The oracle: every query block gathers the key blocks of its list. Any device, any floating type."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from attnmux_blocksparse import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

# Numbers that the scores and the gathered keys of one chunk of query blocks may have.
_CHUNK_NUMBERS = 2**24


class Lists(Protocol):
    """What is read of a `BlockIndex`, which documents it."""

    @property
    def blocks(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def counts(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def block_q(self) -> int: ...  # noqa: D102
    @property
    def block_k(self) -> int: ...  # noqa: D102
    @property
    def q_lengths(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def k_lengths(self) -> torch.Tensor | None: ...  # noqa: D102


class _Chunk(NamedTuple):
    """Some query blocks, R of them, with what they read. A key row is a key block of one head of one sample.

    rows: which, a slice of [B * H * N_q]. keys: int64 [R, K], key rows. mask: bool [R, block_q, K * block_k].
    """

    rows: slice
    keys: torch.Tensor
    mask: torch.Tensor


def _in_blocks(x: torch.Tensor, lengths: torch.Tensor | None, block: int) -> torch.Tensor:
    """[B, S, H, D] -> [B * H * N, block, D], with zeros in place of padding, in the type that is computed in."""
    batch, length, heads, head_dim = x.shape
    is_valid = prepare.valid_tokens(lengths, 0 if lengths is None else lengths.shape[1], block, length, x.device)
    x = torch.where(is_valid[:, :, None, None], x, 0).to(prepare.compute_dtype(x.dtype))
    x = F.pad(x, (0, 0, 0, 0, 0, -length % block))
    blocks = x.shape[1] // block
    return x.view(batch, blocks, block, heads, head_dim).permute(0, 3, 1, 2, 4).reshape(-1, block, head_dim)


def _from_blocks(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B * H * N, block, D] -> the shape [B, S, H, D] and type of `like`, contiguous."""
    batch, length, heads, head_dim = like.shape
    x = x.view(batch, heads, -(-length // x.shape[1]) * x.shape[1], head_dim)[:, :, :length]
    return x.transpose(1, 2).to(like.dtype).contiguous()


def _valid_in_blocks(
    lengths: torch.Tensor | None, block: int, batch: int, length: int, device: torch.device
) -> torch.Tensor:
    """Whether a token is no padding, bool [B, N, block]."""
    blocks = -(-length // block)
    is_valid = prepare.valid_tokens(lengths, blocks, block, length, device)
    return F.pad(is_valid, (0, -length % block)).view(len(is_valid), blocks, block).expand(batch, -1, -1)


def _chunks(q: torch.Tensor, k: torch.Tensor, index: Lists) -> Iterator[_Chunk]:
    """All query blocks in chunks of bounded size, in order."""
    batch, len_q, heads, head_dim = q.shape
    len_k, heads_k = k.shape[1:3]
    width = index.blocks.shape[3]
    device = index.blocks.device
    is_used = torch.arange(width, device=device) < index.counts[..., None]
    shape = (batch, heads, -1, -1)
    is_used = is_used.expand(shape).flatten(0, 2)  # [B * H * N_q, K]
    blocks = torch.where(is_used, index.blocks.expand(shape).flatten(0, 2), 0).long()
    is_query = _valid_in_blocks(index.q_lengths, index.block_q, batch, len_q, device)  # [B, N_q, block_q]
    is_key = _valid_in_blocks(index.k_lengths, index.block_k, batch, len_k, device)
    n_q, n_k = is_query.shape[1], is_key.shape[1]
    row = torch.arange(batch * heads * n_q, device=device)
    sample, head, query_block = row // (heads * n_q), row // n_q % heads, row % n_q
    first_key = (sample * heads_k + head // (heads // heads_k)) * n_k
    step = max(1, _CHUNK_NUMBERS // (width * index.block_k * max(index.block_q, head_dim)))
    for start in range(0, len(row), step):
        at = slice(start, start + step)
        visible = is_key[sample[at, None], blocks[at]] & is_used[at, :, None]  # [R, K, block_k]
        queries = is_query[sample[at], query_block[at]]  # [R, block_q]
        yield _Chunk(at, first_key[at, None] + blocks[at], queries[:, :, None] & visible.flatten(1)[:, None])


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: Lists, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable block-sparse attention.

    Args:
        q: [B, S_q, H, D], any strides.
        k: [B, S_k, H_kv, D], any strides.
        v: like k.
        index: a `BlockIndex`, or anything with its tensors and block sizes.
        softmax_scale: any number.

    Returns:
        out [B, S_q, H, D] in the type of q, and lse [B, H, S_q], natural log, in float32 (float64 for float64 inputs).

    Numerics: half types are computed in float32.
    """
    queries = _in_blocks(q, index.q_lengths, index.block_q)
    keys, values = (_in_blocks(x, index.k_lengths, index.block_k) for x in (k, v))
    outs, lses = [queries[:0]], [queries[:0, :, 0]]
    for chunk in _chunks(q, k, index):
        is_empty = ~chunk.mask.any(-1)
        scores = queries[chunk.rows] @ keys[chunk.keys].flatten(1, 2).transpose(1, 2) * softmax_scale
        scores = scores.masked_fill(~chunk.mask, float("-inf")).masked_fill(is_empty[..., None], 0.0)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().masked_fill(is_empty[..., None], 0.0)
        outs.append(weights @ values[chunk.keys].flatten(1, 2))
        lses.append(lse.masked_fill(is_empty, float("-inf")))
    batch, len_q, heads, _ = q.shape
    lse = torch.cat(lses).view(batch, heads, -(-len_q // index.block_q) * index.block_q)[..., :len_q]
    return _from_blocks(torch.cat(outs), q), lse.contiguous()


def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: Lists,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attention_forward` in closed form.

    Args:
        dout: [B, S_q, H, D].
        dlse: [B, H, S_q], or None for zeros.
        q: as in the forward, and so the rest.
        k: [B, S_k, H_kv, D].
        v: like k.
        index: a `BlockIndex`.
        softmax_scale: any number.

    Returns:
        dq, dk, dv in the shapes and types of q, k, v. With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(dO O) + dLSE),
        dQ = scale dS K, dK = scale dS^T Q.
    """
    queries, douts = (_in_blocks(x, index.q_lengths, index.block_q) for x in (q, dout))
    keys, values = (_in_blocks(x, index.k_lengths, index.block_k) for x in (k, v))
    dlses = None
    if dlse is not None:
        dlses = F.pad(dlse.to(queries.dtype), (0, -q.shape[1] % index.block_q)).reshape(-1, index.block_q)
    dqs, dk, dv = [queries[:0]], torch.zeros_like(keys), torch.zeros_like(values)
    for chunk in _chunks(q, k, index):
        is_empty = ~chunk.mask.any(-1, keepdim=True)
        chunk_keys, chunk_values = keys[chunk.keys].flatten(1, 2), values[chunk.keys].flatten(1, 2)
        scores = queries[chunk.rows] @ chunk_keys.transpose(1, 2) * softmax_scale
        scores = scores.masked_fill(~chunk.mask, float("-inf")).masked_fill(is_empty, 0.0)
        weights = scores.softmax(-1).masked_fill(is_empty, 0.0)
        dweights = douts[chunk.rows] @ chunk_values.transpose(1, 2)
        delta = (weights * dweights).sum(-1, keepdim=True)
        if dlses is not None:
            delta = delta - dlses[chunk.rows][..., None].masked_fill(is_empty, 0.0)
        dscores = weights * (dweights - delta) * softmax_scale
        dqs.append(dscores @ chunk_keys)
        for total, part in (
            (dk, dscores.transpose(1, 2) @ queries[chunk.rows]),
            (dv, weights.transpose(1, 2) @ douts[chunk.rows]),
        ):
            # indexing adds up in a fixed order on a GPU too
            total.index_put_((chunk.keys.flatten(),), part.reshape(-1, *keys.shape[1:]), accumulate=True)
    return _from_blocks(torch.cat(dqs), q), _from_blocks(dk, k), _from_blocks(dv, v)


def select(pooled_q: torch.Tensor, pooled_k: torch.Tensor, topk: int, protected: int, order: float) -> torch.Tensor:
    """The best key blocks of every query block, int32 [B, H, N_q, topk], ascending; see `ops.select_top_blocks`."""
    batch, heads, n_q, head_dim = pooled_q.shape
    n_k = pooled_k.shape[2]
    keys = pooled_k.repeat_interleave(heads // pooled_k.shape[1], 1).reshape(-1, n_k, head_dim)
    queries = pooled_q.reshape(-1, n_q, head_dim)
    lists = [queries.new_empty(0, n_q, topk, dtype=torch.int32)]
    step = max(1, _CHUNK_NUMBERS // max(n_q * n_k, 1))
    for start in range(0, len(queries), step):
        at = slice(start, start + step)
        scores = (queries[at] * order) @ keys[at].transpose(1, 2)
        # NaN sorts as the largest number, and a stable sort keeps equal ones in the order of their index.
        scores[..., :protected] = float("nan")
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :topk]
        lists.append(best.sort(-1).values.to(torch.int32))
    return torch.cat(lists).view(batch, heads, n_q, topk)
