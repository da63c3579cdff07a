"""One attention call as the checks make it, its gradients, and comparison of what it returns."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attnmux.testing.tolerance import ErrorMeasure, dense_attention_baseline, dense_attention_oracle, measure_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from attnmux.backend import AttentionMetadata

__all__ = [
    "Case",
    "DenseLimit",
    "baseline_gradient_errors",
    "differ",
    "gradient_term_sizes",
    "gradients",
    "in_double",
    "named_parameters",
    "with_gradients",
]


@dataclass(frozen=True)
class DenseLimit:
    """Arguments at which a backend that is not exact computes dense attention.

    Attributes:
        impl_args: Constructor arguments, in place of the suite's `impl_args`. Parameters keep the values they are
            constructed with.
        metadata: Metadata of the call.
        extra_inputs: Extra inputs of the call.
    """

    impl_args: Mapping[str, Any] = field(default_factory=dict)
    metadata: AttentionMetadata | None = None
    extra_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Case:
    """One attention call: its tensors and what the impl is built with.

    Attributes:
        q: `[B, S_q, H, D]`.
        k: `[B, S_k, H_kv, D]`.
        v: `[B, S_k, H_kv, D]`.
        metadata: Metadata of the call, or None.
        extra_inputs: The backend's own tensors, without `attn_mask`.
        softmax_scale: Factor on the scores, or None for the default.
        causal: Whether attention is causal.
        attn_mask: Mask, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    metadata: AttentionMetadata | None = None
    extra_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    softmax_scale: float | None = None
    causal: bool = False
    attn_mask: torch.Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Scale (resolved), causal and mask, as the oracle takes them."""
        scale = self.q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        return {"softmax_scale": scale, "causal": self.causal, "attn_mask": self.attn_mask}

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """Return this case with `change` applied to q, k, v and to extra inputs of the rank of q."""
        extra = {name: change(x) if x.dim() == 4 else x for name, x in self.extra_inputs.items()}
        return dataclasses.replace(self, q=change(self.q), k=change(self.k), v=change(self.v), extra_inputs=extra)


def in_double(impl: Any) -> Any:
    """Return an impl with parameters as a float64 copy, any other as it is."""
    return copy.deepcopy(impl).double() if isinstance(impl, torch.nn.Module) else impl


def named_parameters(impl: Any) -> dict[str, torch.Tensor]:
    """Return the trainable parameters of an impl by name."""
    if not isinstance(impl, torch.nn.Module):
        return {}
    return {f"parameter {name}": x for name, x in impl.named_parameters() if x.requires_grad}


def with_gradients(case: Case, dtype: torch.dtype | None = None) -> tuple[Case, dict[str, torch.Tensor]]:
    """Return the case on leaves that require gradients, and these by name; strides are kept."""

    def leaf(x: torch.Tensor) -> torch.Tensor:
        x = x.detach() if dtype is None or dtype == x.dtype else x.detach().to(dtype)
        # a view of the same memory: a clone would lose the strides under test
        return x.view_as(x).requires_grad_()

    leaves: dict[str, Any] = {"q": leaf(case.q), "k": leaf(case.k), "v": leaf(case.v)}
    extra = {name: leaf(x) if x.is_floating_point() else x for name, x in case.extra_inputs.items()}
    changed = dataclasses.replace(case, **leaves, extra_inputs=extra)
    return changed, {**leaves, **{name: x for name, x in extra.items() if x.requires_grad}}


def gradients(
    output: torch.Tensor, leaves: Mapping[str, torch.Tensor], cotangent: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the gradients by name; zeros for a leaf that the output does not depend on."""
    assert output.requires_grad, "the output does not require gradients, though q, k and v do: the graph is cut"
    found = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def baseline_gradient_errors(case: Case, cotangent: torch.Tensor) -> dict[str, ErrorMeasure]:
    """Return the errors of PyTorch's own gradients of q, k and v for the cotangent `[B, S_q, H, D]`."""
    bare = dataclasses.replace(case, extra_inputs={})
    native_case, native = with_gradients(bare)
    exact_case, exact = with_gradients(bare, torch.float64)
    output = dense_attention_baseline(native_case.q, native_case.k, native_case.v, **case.options)
    truth = dense_attention_oracle(exact_case.q, exact_case.k, exact_case.v, **case.options)
    found, wanted = gradients(output, native, cotangent), gradients(truth, exact, cotangent.double())
    return {name: measure_error(found[name], wanted[name]) for name in found}


def gradient_term_sizes(case: Case, cotangent: torch.Tensor) -> dict[str, float]:
    """Return the typical size of one score's share in the gradients of q and k, before the shares cancel."""

    def rms(x: torch.Tensor) -> float:
        return x.detach().double().square().mean().sqrt().item()

    head_size = case.q.shape[-1]
    share = head_size**-0.5 * head_size**0.5 * rms(cotangent) * rms(case.v)
    return {"q": share * rms(case.k), "k": share * rms(case.q)}


def differ(a: object, b: object) -> bool:
    """Return whether two values differ, looking into dataclasses, containers and tensors."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b)
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return any(differ(getattr(a, entry.name), getattr(b, entry.name)) for entry in dataclasses.fields(a))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return type(a) is not type(b) or len(a) != len(b) or any(map(differ, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() != b.keys() or any(differ(a[key], b[key]) for key in a)
    return type(a) is not type(b) or bool(a != b)
