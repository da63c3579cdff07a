"""The option `--device` of every command that computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["checked_device"]


def checked_device(name: str | None) -> torch.device:
    """Return the device, made the current one; None is the current CUDA device if there is one, else the CPU.

    Raises:
        UnsupportedRequestError: It is no device, or not there.
    """
    import torch

    from attnmux.errors import UnsupportedRequestError
    from attnmux.selector import current_device

    try:
        device = torch.device(name or current_device())
    except RuntimeError as error:
        raise UnsupportedRequestError(
            f"--device {name!r} is not a device; expected 'cpu', 'cuda' or 'cuda:N'"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedRequestError(
            f"--device {name!r}: torch {torch.__version__} sees no CUDA device; use --device cpu"
        )
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UnsupportedRequestError(
                f"--device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices, from 0"
            )
        # kernels are launched on the current device
        torch.cuda.set_device(device.index or 0)
    return device
