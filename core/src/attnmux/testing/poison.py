"""Fresh memory full of NaN, so that an output element that a kernel forgets to write shows."""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["poisoned_memory"]

_PATCHED: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = allocate(*args, **kwargs)
        if fresh.is_floating_point() or fresh.is_complex():
            with torch.no_grad():
                fresh.fill_(float("nan"))
        return fresh

    return allocate_poisoned


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives allocate with NaN inside the block, in every thread.

    `torch.empty`, `empty_like`, `empty_strided`, `empty_permuted` and the tensor methods `new_empty` and
    `new_empty_strided` are replaced, for floating and complex dtypes. Memory that torch's own kernels allocate, and names
    bound earlier by `from torch import empty`, stay as they are. Integer memory too: poisoned indices would turn a
    forgotten element into a crash.
    """
    missing = object()
    previous = [(owner, name, vars(owner).get(name, missing)) for owner, name in _PATCHED]
    try:
        for owner, name in _PATCHED:
            setattr(owner, name, _poisoning(getattr(owner, name)))
        yield
    finally:
        for owner, name, original in previous:
            # the methods are inherited from a base of torch.Tensor, which has them back once ours is gone
            if original is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
