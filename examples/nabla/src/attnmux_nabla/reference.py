"""The definition, patch by patch; the backend is tested against it."""

import torch

SIDE = 8


def visible_tokens(q, k, grid, scale: float, threshold: float) -> torch.Tensor:
    """Return which keys every query attends to, bool [B, H, S, S], for q and k [B, S, H, D] of a grid (T, H, W)."""
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    patch = torch.stack([t, y // SIDE, x // SIDE], -1).flatten(0, 2).to(q.device)
    members = [(patch == place).all(-1) for place in patch.unique(dim=0)]
    visible = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
    for rows in members:
        pooled = q[:, rows].mean(1)  # [B, H, D]
        weights = torch.stack([(pooled * k[:, keys].mean(1)).sum(-1) * scale for keys in members], -1).softmax(-1)
        heaviest = weights.sort(dim=-1, descending=True, stable=True).indices
        # the weight of everything heavier than a patch must fall short of the threshold for it to be needed
        before = weights.gather(-1, heaviest).cumsum(-1) - weights.gather(-1, heaviest)
        needed = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, heaviest, before <= threshold)
        for number, keys in enumerate(members):
            visible |= needed[..., number, None, None] & rows[:, None] & keys
    return visible
