"""The method in the plainest form: Python loops choose the chunks, one dense mask says who sees whom."""

import itertools

import torch

from attnmux.testing import dense_attention_oracle
from attnmux_vmoba.prepare import SCOPES

GRID = (4, 4, 6)
CHUNK_SIZES = {"temporal": 1, "temporal_short": 0.8, "spatial": (2, 3), "st": (2, 2, 3)}
PAIRS = [(mode, scope) for mode, scopes in SCOPES.items() for scope in scopes]


def chunk_of_tokens(grid, chunk_size):
    """The chunk of every raster token, by coordinates."""
    T, H, W = grid
    if isinstance(chunk_size, (int, float)):
        return [s // int(chunk_size * H * W) for s in range(T * H * W)]
    t, h, w = (T, *chunk_size) if len(chunk_size) == 2 else chunk_size
    return [
        ((a // t) * (H // h) + b // h) * (W // w) + c // w
        for a, b, c in itertools.product(range(T), range(H), range(W))
    ]


def make_tensors(B=2, H=2, D=8, grid=GRID, heads_kv=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    S = grid[0] * grid[1] * grid[2]
    q, dout = (torch.randn(B, S, H, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    k, v = (torch.randn(B, S, heads_kv or H, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return q, k, v, dout


def choose(q, k, chunk_of, mode, scope, topk=2, threshold=0.25, keeps_one=False):
    """Who sees which chunk, bool [B, H, C, S], tokens in raster order; sums and comparisons in Python floats."""
    B, S, H, _ = q.shape
    group = H // k.shape[2]
    C = max(chunk_of) + 1
    members = [[s for s in range(S) if chunk_of[s] == c] for c in range(C)]
    # position of a token in chunk order, which breaks ties
    place = {s: i for i, s in enumerate(itertools.chain(*members))}
    result = torch.zeros(B, H, C, S, dtype=torch.bool)
    for b in range(B):
        gate = {}
        for h, c in itertools.product(range(H), range(C)):
            mean = k[b, members[c], h // group].double().mean(0)
            for s, value in enumerate((q[b, :, h].double() @ mean).tolist()):
                gate[c, h, s] = value
        key = {
            "query_head": lambda c, h, s: (h, s),
            "head_global": lambda c, h, s: h,
            "overall": lambda c, h, s: 0,
            "block": lambda c, h, s: c,
        }[scope]
        scopes = {}
        for entry in gate:
            scopes.setdefault(key(*entry), []).append(entry)
        for entries in scopes.values():
            own = [e for e in entries if chunk_of[e[2]] == e[0]]
            others = [e for e in entries if chunk_of[e[2]] != e[0]]
            others.sort(key=lambda e: (-gate[e], e[0], e[1], place[e[2]]))
            kept = list(own)
            if mode == "topk":
                queries = len({(h, s) for _, h, s in entries})
                kept += others[: (min(topk, C) - 1) * queries]
            else:
                low, high = min(gate[e] for e in entries), max(gate[e] for e in entries)
                g = {e: (gate[e] - low) / (high - low) if high > low else 0.0 for e in entries}
                total = sum(g.values()) + 1e-6
                remain = max(0.0, threshold - sum(g[e] for e in own) / total)
                share = 0.0
                for i, e in enumerate(others):
                    # up to and including the first entry at which the share reaches what remains; 1 is everything
                    if threshold < 1 and share >= remain and not (keeps_one and i == 0):
                        break
                    kept.append(e)
                    share += g[e] / total
            for c, h, s in kept:
                result[b, h, c, s] = True
    return result


def token_mask(chosen, chunk_of):
    """[B, H, C, S] -> which key a query sees, [B, H, S, S]."""
    return chosen[:, :, chunk_of].transpose(2, 3)


def attend(q, k, v, chosen, chunk_of, scale=None):
    return dense_attention_oracle(q, k, v, softmax_scale=scale, attn_mask=token_mask(chosen, chunk_of))
