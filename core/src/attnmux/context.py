"""What one forward pass of a model shares with its attention layers: the step and the backend's metadata.

    with set_forward_context(current_timestep=step, attn_metadata=metadata):
        model(...)

The context belongs to the thread that set it. Activation checkpointing runs a layer's forward again during backward,
possibly in one of autograd's own threads; there the context of the thread that called `backward` is found, or the only
one that is active. Under `torch.compile(fullgraph=True)` reading the context traces, and guards hold on what a layer
reads from it only, so that a new timestep alone does not recompile.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnmux.errors import ForwardContextError

if TYPE_CHECKING:
    from types import TracebackType

    from attnmux.backend import AttentionMetadata

__all__ = ["ForwardContext", "active_attn_metadata", "get_forward_context", "set_forward_context"]


@dataclass(eq=False)
class ForwardContext:
    """State of one forward pass.

    Attributes:
        current_timestep: Index of the denoising step, from 0.
        attn_metadata: Metadata for the layers' backend, or None.
    """

    current_timestep: int
    attn_metadata: AttentionMetadata | None


# A ContextVar cannot be read under torch.compile(fullgraph=True); a thread-local can, if what it holds is the instance's:
# values that a class has for all threads are guarded on as the class's.
class _Local(threading.local):
    def __init__(self) -> None:
        self.context: ForwardContext | None = None


_local = _Local()
# Contexts that are set right now in any thread, for backward passes that run in a thread of their own. Keyed by identity;
# single dictionary operations are atomic.
_active: dict[int, ForwardContext] = {}
# Where autograd's device threads find the context of the thread that called backward: torch carries objects kept under
# a key in its own thread-local state over to them.
_TLS_KEY = "attnmux_forward_context"


class set_forward_context:  # noqa: N801 - a context manager, used like a function
    """Make a context current for this thread inside the block; the previous one comes back, also after an exception.

    Args:
        current_timestep: Index of the denoising step, from 0.
        attn_metadata: Metadata for the layers' backend; None for backends that need none.
    """

    def __init__(self, *, current_timestep: int, attn_metadata: AttentionMetadata | None = None) -> None:
        self._context = ForwardContext(current_timestep, attn_metadata)

    def __enter__(self) -> ForwardContext:
        self._previous = _local.context
        _local.context = self._context
        if not torch.compiler.is_compiling():
            _active[id(self._context)] = self._context
            _stash(self._context)
        return self._context

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _local.context = self._previous
        if not torch.compiler.is_compiling():
            _active.pop(id(self._context), None)
            _stash(self._previous)


def get_forward_context() -> ForwardContext:
    """Return the context of this thread or, in a backward pass, of the forward that is being recomputed.

    Raises:
        ForwardContextError: None is set; or a backward pass runs in a thread of its own while several are.
    """
    context = _local.context
    if context is None:
        context = _backward_context()
    if context is None:
        raise ForwardContextError(
            "no forward context is set in this thread: wrap the model call in "
            "`with attnmux.set_forward_context(current_timestep=..., attn_metadata=...):`, or pass attn_metadata= to the layer"
        )
    return context


def active_attn_metadata() -> AttentionMetadata | None:
    """Return the current context's metadata; None where there is no context."""
    context = _local.context
    if context is None:
        context = _backward_context()
    return None if context is None else context.attn_metadata


def _stash(context: ForwardContext | None) -> None:
    torch._C._stash_obj_in_tls(_TLS_KEY, context)


def _backward_context() -> ForwardContext | None:
    """Return the context a recomputation belongs to, or None outside of backward passes."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return None
    if torch._C._is_key_in_tls(_TLS_KEY):
        stashed: ForwardContext | None = torch._C._get_obj_in_tls(_TLS_KEY)
        if stashed is not None:
            return stashed
    active = list(_active.values())
    if len(active) > 1:
        raise ForwardContextError(
            f"backward recomputes a layer in a thread without a forward context while {len(active)} are active in others; "
            "set the context in the thread that calls backward, or pass attn_metadata= to the layer"
        )
    return active[0] if active else None
