"""Runs a diffusers attention processor with its attention replaced, and leaves the rest of its mathematics alone.

A processor projects, normalises, rotates, attends and projects back. It attends through one of two names of its module:
`dispatch_attention_fn`, or `F.scaled_dot_product_attention`. A copy of its `__call__` is made that finds our function under
that name; diffusers' module, its dispatcher and its other processors stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from attnmux.errors import UnsupportedRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from attnmux.integrations.diffusers.processor import AttnmuxProcessor

__all__ = ["active", "redirected"]


class _Active(threading.local):
    """The processor that runs right now in this thread, and its gate.

    A thread-local, because torch.compile(fullgraph=True) traces it and no ContextVar.
    """

    def __init__(self) -> None:
        self.processor: AttnmuxProcessor | None = None
        self.gate: torch.Tensor | None = None


active = _Active()


def redirected(processor: object) -> Callable[..., Any] | None:
    """Return the processor's `__call__` with its attention redirected to the active layer; None if it has no known way."""
    call = inspect.getattr_static(type(processor), "__call__", None)
    return _copy(call) if isinstance(call, types.FunctionType) else None


@functools.cache
def _copy(call: types.FunctionType) -> Callable[..., Any] | None:
    # one copy for all layers, so that compiled blocks are shared among them
    names = call.__code__.co_names
    is_dispatched = "dispatch_attention_fn" in names
    if not is_dispatched and not ("scaled_dot_product_attention" in names and call.__globals__.get("F") is F):
        return None
    module = _module_copy(call.__module__)
    copy = types.FunctionType(call.__code__, vars(module), call.__name__, call.__defaults__, call.__closure__)
    copy.__kwdefaults__ = call.__kwdefaults__
    return copy


@functools.cache
def _module_copy(name: str) -> types.ModuleType:
    """Return a module with the names of another and our two functions among them."""
    copy = _registered(name, vars(sys.modules[name]))
    ours: dict[str, Any] = {"dispatch_attention_fn": _dispatch_attention}
    if vars(copy).get("F") is F:
        ours["F"] = _registered(F.__name__, {**vars(F), "scaled_dot_product_attention": _sdpa})
    vars(copy).update(ours)
    return copy


def _registered(name: str, names: Mapping[str, Any]) -> types.ModuleType:
    # torch.compile looks a function's globals up by their module's name, so that the copy must be a module of its own
    module = types.ModuleType(f"{__name__}.{name.replace('.', '_')}")
    # __package__ stays: functions import their neighbours relative to it
    own = ("__name__", "__spec__", "__loader__", "__doc__")
    vars(module).update({key: value for key, value in names.items() if key not in own})
    sys.modules[module.__name__] = module
    return module


def _processor() -> AttnmuxProcessor:
    processor = active.processor
    assert processor is not None
    return processor


def _dispatch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: object = None,
    parallel_config: object = None,
) -> torch.Tensor:
    """Stand in for diffusers' `dispatch_attention_fn`: q, k and v are `[B, S, H, D]`."""
    if attention_kwargs:
        raise UnsupportedRequestError(
            f"the model passes {', '.join(sorted(attention_kwargs))} for one of diffusers' own backends; restore() the model"
        )
    return _processor().attend(query, key, value, active.gate, attn_mask, dropout_p, is_causal, scale)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stand in for torch's own function: q, k and v are `[B, H, S, D]`."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _processor().attend(query, key, value, active.gate, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)
