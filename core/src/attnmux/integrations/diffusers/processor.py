"""The processor that stands in a diffusers attention module: the model's own, with attnmux layers for the attention."""

from __future__ import annotations

import functools
import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnmux.errors import UnsupportedRequestError
from attnmux.integrations.diffusers.redirect import active, redirected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attnmux.layers import LocalAttention

__all__ = ["AttnmuxProcessor", "make_processor", "phase"]

GATE = "gate_compress"
"""The extra input that a learned projection of the hidden states supplies."""


class _Phase(threading.local):
    """The phase of the schedule in which the current forward pass of this thread is."""

    def __init__(self) -> None:
        self.index: int = 0


phase = _Phase()


class AttnmuxProcessor(nn.Module):
    """Runs the model's own processor, with attention by the layer of the current phase.

    Args:
        original: The processor that it stands in for.
        layers: One layer per backend that the module ever uses, by backend name.
        order: Name of the backend in every phase.
        gate: Projection of the hidden states to the gate, for backends that take one; None for others.
        assume_full_masks: The model's masks hide nothing. They are held to it and not passed on.
        is_self: The module was chosen as self-attention, and is held to it.
    """

    _call: Callable[..., Any]

    def __init__(
        self,
        original: object,
        layers: dict[str, LocalAttention],
        order: Sequence[str],
        gate: nn.Module | None = None,
        *,
        assume_full_masks: bool = False,
        is_self: bool = False,
    ) -> None:
        super().__init__()
        self.original = original
        self.attention = nn.ModuleDict(layers)
        self.order = tuple(order)
        self.takes_gate = frozenset(
            name for name, layer in layers.items() if GATE in layer.selection.spec.capabilities.extra_inputs
        )
        self.takes_mask = frozenset(
            name for name, layer in layers.items() if "attn_mask" in layer.selection.spec.capabilities.extra_inputs
        )
        self.assume_full_masks = assume_full_masks
        self.is_self = is_self
        if gate is not None:
            self.to_gate_compress = gate
        self.has_gate = gate is not None

    def run(self, attn: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's own processor returns, with attention by attnmux."""
        previous = active.processor, active.gate
        active.processor = self
        active.gate = None
        if self.has_gate and self.order[phase.index] in self.takes_gate:
            active.gate = self.to_gate_compress(hidden_states)
        try:
            return self._call(self.original, attn, hidden_states, *args, **kwargs)
        finally:
            active.processor, active.gate = previous

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gate: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        """Return the attention output.

        Args:
            query: `[B, S_q, H, D]`.
            key: `[B, S_k, H_kv, D]`.
            value: `[B, S_k, H_kv, D]`.
            gate: `[B, S_q, H * D]` or None.
            attn_mask: Bool or additive mask, `[S_q, S_k]` or broadcastable to `[B, H, S_q, S_k]`, or None.
            dropout_p: Must be 0.
            is_causal: Must be False.
            scale: Factor on the scores, the same as the layer's; None = `D ** -0.5`, likewise.

        Raises:
            UnsupportedRequestError: The model asks for what the layer was not built for; names it.
        """
        name = self.order[phase.index]
        layer: Any = self.attention[name]
        if is_causal:
            raise UnsupportedRequestError(
                f"{name}: the model asks for causal attention (is_causal=True), and its layer was built without; restore() "
                "this module, or leave it out of modules="
            )
        if dropout_p:
            raise UnsupportedRequestError(
                f"{name}: the model asks for dropout_p={dropout_p} inside attention, which no backend of attnmux computes; "
                "set the model's attention dropout to 0"
            )
        wanted = query.shape[-1] ** -0.5 if scale is None else scale
        if wanted != layer.attn_impl.softmax_scale:
            raise UnsupportedRequestError(
                f"{name}: the model asks for scale={wanted}, the layer was built with {layer.attn_impl.softmax_scale}; give "
                f"apply(softmax_scale={wanted})"
            )
        if self.is_self and query.shape[1] != key.shape[1]:
            raise UnsupportedRequestError(
                f"{layer.attn_impl.prefix} was chosen as self-attention, and it attends from {query.shape[1]} tokens to "
                f"{key.shape[1]}: the model does not say that this is another attention. Choose modules by patterns of "
                "paths, such as 'blocks.*.attn1'"
            )
        extra: dict[str, torch.Tensor] = {}
        if attn_mask is not None and self.assume_full_masks:
            _hold_to_full(attn_mask, name)
        elif attn_mask is not None and name not in self.takes_mask:
            raise UnsupportedRequestError(
                f"{name} takes no mask, and the model passes one, {attn_mask.dtype} {list(attn_mask.shape)}. If it hides nothing, "
                "as with text that is not padded, say apply(assume_full_masks=True); else choose a backend with masks"
            )
        elif attn_mask is not None:
            extra["attn_mask"] = attn_mask
        if gate is not None:
            extra[GATE] = gate.view(*gate.shape[:2], *query.shape[2:])
        output: torch.Tensor = layer(query, key, value, **extra)
        return output

    @property
    def _attention_backend(self) -> None:
        """None: diffusers' dispatcher has no say here."""
        return

    @_attention_backend.setter
    def _attention_backend(self, value: object) -> None:
        if value is not None:
            raise UnsupportedRequestError(
                f"this model's attention is attnmux's ({', '.join(self.attention)}), so that diffusers' set_attention_backend "
                f"({value!r}) has no effect; restore() it first, or choose the backend in apply()"
            )

    @property
    def _parallel_config(self) -> None:
        """None: layers of `apply` attend within one process."""
        return

    @_parallel_config.setter
    def _parallel_config(self, value: object) -> None:
        if value is not None:
            raise UnsupportedRequestError(
                "diffusers' context parallelism splits the sequence inside its own dispatcher, which attnmux's layers do not "
                "pass through; restore() the model first, or build it with attnmux.DistributedAttention"
            )


def _hold_to_full(mask: torch.Tensor, backend: str) -> None:
    """Raise if a mask hides a key; on a GPU, and in compiled code, when the device gets there, which nothing waits for."""
    is_full = (mask if mask.dtype == torch.bool else mask == 0).all()
    said = (
        f"{backend}: apply(assume_full_masks=True) was said, and the model passes a mask that hides keys; leave the padding of the "
        "text out, or choose a backend with masks and leave the argument out"
    )
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(is_full, said)
    elif not is_full:
        raise UnsupportedRequestError(said)


def make_processor(
    original: object,
    layers: dict[str, LocalAttention],
    order: Sequence[str],
    gate: nn.Module | None = None,
    *,
    assume_full_masks: bool = False,
    is_self: bool = False,
) -> AttnmuxProcessor:
    """Return a processor that takes the same arguments as the original.

    Raises:
        UnsupportedRequestError: The original attends in a way that is not known.
    """
    if isinstance(original, nn.Module):
        raise UnsupportedRequestError(
            f"{type(original).__name__} has parameters of its own, which replacing it would take out of the model; remove its "
            "adapter first, or leave its module out of modules="
        )
    if redirected(original) is None:
        raise UnsupportedRequestError(
            f"{type(original).__name__} attends neither through dispatch_attention_fn nor through "
            "F.scaled_dot_product_attention, so that its attention cannot be replaced"
        )
    cls: Any = type(original)
    return _processor_class(cls)(original, layers, order, gate, assume_full_masks=assume_full_masks, is_self=is_self)


@functools.cache
def _processor_class(original: Any) -> type[AttnmuxProcessor]:
    """Return a class whose `__call__` shows the original's signature, by which diffusers filters arguments."""
    call: Any = redirected(object.__new__(original))

    def run(self: AttnmuxProcessor, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    run.__signature__ = inspect.signature(original.__call__)  # type: ignore[attr-defined]
    return type(f"Attnmux{original.__name__}", (AttnmuxProcessor,), {"__call__": run, "_call": staticmethod(call)})
