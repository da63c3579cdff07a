"""Copies between tensors whose rows lie apart."""

from __future__ import annotations

import torch

__all__ = ["copy_words"]

_WORD = 16


def copy_words(into: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` into `into`, of the same shape and dtype, in words of 16 bytes where both have such.

    Torch's kernel for tensors that are not contiguous moves an element per load, which half precision is too short for.
    """
    if not into.numel():
        return
    per_word = _WORD // into.element_size()
    if _has_words(into, per_word) and _has_words(source, per_word):
        into, source = into.view(torch.complex128), source.view(torch.complex128)
    into.copy_(source)


def _has_words(x: torch.Tensor, per_word: int) -> bool:
    return (
        x.stride(-1) == 1
        and x.shape[-1] % per_word == 0
        and x.data_ptr() % _WORD == 0
        and all(stride % per_word == 0 for stride in x.stride()[:-1])
    )
