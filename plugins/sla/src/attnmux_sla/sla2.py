"""The replaceable parts of SLA in the form of SLA2 (arXiv 2602.12675): a learned router and a learned mix of the branches.

No code of SLA2 is public. Its abstract fixes what these parts are for; sizes and where the ratio comes from are this
package's reading.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["AlphaMix", "LearnedRouter"]


class LearnedRouter(nn.Module):
    """Scores pooled q and k after a projection of each, which start as the identity: the choice of plain SLA.

    The hard choice of blocks carries no gradient. To train the router, call it on pooled q and k and fit its scores.

    Args:
        head_size: D.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.proj_q, self.proj_k = (nn.Linear(head_size, head_size, bias=False) for _ in range(2))
        for projection in (self.proj_q, self.proj_k):
            nn.init.eye_(projection.weight)

    def forward(self, pooled_q: torch.Tensor, pooled_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is scored in place of pooled q `[B, H, N_q, D]` and k `[B, H_kv, N_k, D]`, same shapes and dtype."""
        return (
            F.linear(pooled_q, self.proj_q.weight.to(pooled_q.dtype)),
            F.linear(pooled_k, self.proj_k.weight.to(pooled_k.dtype)),
        )


class AlphaMix(nn.Module):
    """Joins the branches as alpha * sparse + (1 - alpha) * linear, with alpha = sigmoid(q . w + b) for every query.

    Both branches are averages of values, so that their mix is one too. It starts at alpha = 1/2.

    Args:
        head_size: D.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.ratio = nn.Linear(head_size, 1)
        nn.init.zeros_(self.ratio.weight)
        nn.init.zeros_(self.ratio.bias)

    def forward(self, sparse: torch.Tensor, linear: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Return the mix `[B, S_q, H, D]` of the branches, in their dtype; q `[B, S_q, H, D]` may have another."""
        weight, bias = (x.to(sparse.dtype) for x in (self.ratio.weight, self.ratio.bias))
        alpha = F.linear(q.to(sparse.dtype), weight, bias).sigmoid()  # [B, S_q, H, 1]
        return alpha * sparse + (1 - alpha) * linear
