"""Launching a kernel for slice after slice of one call.

A launch through Triton takes the host 31 us, most of it to find the compiled code by the types, alignments and values of some
forty arguments. A later slice that agrees in all that the code depends on calls it at once, in about half the time.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Launches", "launch"]

Launches = dict[Any, Any]
"""The compiled code of what one call has launched; made for the call, on one device, and dropped with it."""


def launch(
    launches: Launches, kernel: Any, grid: tuple[int, int, int], *arguments: Any, num_warps: int, **constants: Any
) -> None:
    """Launch a kernel whose compile-time arguments are `constants`, again if the same code is among the launches."""
    # Triton's interpreter has none, and compiles nothing
    free = getattr(kernel, "do_not_specialize", ())
    key = (
        kernel,
        num_warps,
        *constants.values(),
        *(_specialised(x, name in free) for name, x in zip(kernel.arg_names, arguments, strict=False)),
    )
    compiled = launches.get(key)
    if compiled is None:
        launches[key] = kernel[grid](*arguments, **constants, num_warps=num_warps)
    else:
        compiled[grid](*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))


def _specialised(x: Any, is_free: bool) -> Any:
    """What the compiled code depends on: type and alignment of a tensor, the value of a number, or its width if it is free."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, int) and is_free:
        return x.bit_length() > 31
    return x
