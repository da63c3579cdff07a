"""The definition, pair of tokens by pair of tokens; the backend is tested against it."""

import functools
import math

import torch

BLOCK = 64


def sees(i: int, k: int, j: int, m: int, band: float) -> bool:
    """Whether position k of frame i attends to position m of frame j: the paper's mask, and its sink."""
    octave = 2 ** math.floor(math.log2(max(abs(i - j), 1)))
    in_band = octave <= band and abs(k - m) + 1 <= band / octave
    on_diagonal = k == m and abs(i - j) % math.ceil(octave / band) == 0
    return in_band or on_diagonal or j == 0


@functools.cache
def visible_tokens(grid, width: float) -> torch.Tensor:
    """Return which keys every query attends to, bool [1, 1, S, S]: whole blocks in which one pair is seen."""
    frames, rows, columns = grid
    tokens = rows * columns
    places = [(t, p) for t in range(frames) for p in range(tokens)]
    mask = torch.tensor([[sees(i, k, j, m, tokens * width) for j, m in places] for i, k in places])
    block = torch.tensor([t * tokens + p // BLOCK for t, p in places])
    for a in block.unique():
        for b in block.unique():
            square = (block == a)[:, None] & (block == b)
            mask[square] = mask[square].any()
    return mask[None, None]
