"""What card a tensor is on."""

from __future__ import annotations

import torch


def device_capability(x: torch.Tensor) -> tuple[int, int] | None:
    """Compute capability of the NVIDIA card that x is on; None elsewhere."""
    if not x.is_cuda or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(x.device)
