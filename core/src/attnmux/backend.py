"""The four classes a backend is made of.

AttentionBackend          static methods that say which classes belong together
AttentionImpl             one layer's attention: constructor arguments, forward
AttentionMetadata         what a forward pass needs beyond q, k, v: the geometry, the step
AttentionMetadataBuilder  makes the metadata from what a pipeline knows
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from attnmux.errors import UnsupportedRequestError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from attnmux.spec import AttentionRequest, Reason

__all__ = [
    "REQUIRED_METHODS",
    "AttentionBackend",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "DenseMetadataBuilder",
    "LayerPlace",
    "layer_index",
]

REQUIRED_METHODS = ("get_name", "get_impl_cls", "get_metadata_cls", "get_builder_cls", "get_supported_head_sizes")
"""Static methods without which a backend is refused when it is loaded."""

T = TypeVar("T", bound="AttentionMetadata")


class AttentionBackend(ABC):
    """Names the classes of one backend. It is never instantiated; the registry checks it when it is loaded."""

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """Return the backend's name, the same as its spec's."""

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        """Return the class of one layer's attention."""

    @staticmethod
    @abstractmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """Return the class of the metadata; `AttentionMetadata` itself where nothing is needed."""

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        """Return the class that builds the metadata."""

    @staticmethod
    @abstractmethod
    def get_supported_head_sizes() -> list[int]:
        """Return the head sizes that the impl takes; an empty list means every one its capabilities declare."""

    @staticmethod
    def check_request(request: AttentionRequest) -> list[Reason]:
        """Return the reasons why this request cannot be served that `Capabilities` cannot express; empty if it can."""
        return []

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return in a few words what would run this request, and why; empty where there is only one engine."""
        return ""

    @staticmethod
    def get_conformance_cls() -> type[Any] | None:
        """Return the `attnmux.testing.BackendConformance` subclass that `attnmux check` runs.

        None runs the suite as it is, which suits an exact backend without metadata. Import it inside the method: the suite
        needs pytest, which users of the backend need not have.
        """
        return None


@dataclass
class AttentionMetadata:
    """What a forward pass needs beyond q, k and v. Backends derive from it.

    Attributes:
        current_timestep: Index of the denoising step, from 0.
    """

    current_timestep: int

    def asdict_zerocopy(self, skip_fields: set[str] | None = None) -> dict[str, Any]:
        """Return the fields by name, the same objects, without those in `skip_fields`."""
        skipped = skip_fields or set()
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in skipped
        }


class AttentionMetadataBuilder(ABC, Generic[T]):
    """Builds the metadata of one forward pass."""

    @abstractmethod
    def __init__(self) -> None: ...

    @abstractmethod
    def prepare(self) -> None:
        """Reset what was kept from the previous batch."""

    @abstractmethod
    def build(self, **kwargs: Any) -> T:
        """Return the metadata for one forward pass."""


class DenseMetadataBuilder(AttentionMetadataBuilder[AttentionMetadata]):
    """Builds metadata that holds the timestep only; dense attention needs none."""

    def __init__(self) -> None:
        """Nothing to keep."""

    def prepare(self) -> None:
        """Nothing to reset."""

    def build(self, *, current_timestep: int = 0, **kwargs: Any) -> AttentionMetadata:
        """Return the metadata of one forward pass.

        Args:
            current_timestep: Index of the denoising step, from 0.
            **kwargs: None is known.

        Raises:
            UnsupportedRequestError: An argument that dense attention has no use for; names it.
        """
        if kwargs:
            raise UnsupportedRequestError(
                f"dense attention has no use for {', '.join(sorted(kwargs))}; remove it, or choose the backend it belongs to"
            )
        return AttentionMetadata(current_timestep=current_timestep)


class AttentionImpl(ABC, Generic[T]):
    """Attention of one layer. A subclass that has parameters is also an `nn.Module`.

    Args:
        num_heads: Query heads, >= 1.
        head_size: Channels of one head, >= 1.
        softmax_scale: Factor on the scores; None = `head_size ** -0.5`; 0.0 is a value.
        causal: Whether a query sees only keys up to its own position, the last query aligned with the last key.
        num_kv_heads: Key and value heads; None = `num_heads`.
        prefix: Name of the layer in its model, for messages.
        **extra_impl_args: Arguments of the backend's own; this class knows none and refuses each by name.

    Raises:
        UnsupportedRequestError: An argument is unknown, out of range, or one the backend cannot honour.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        if extra_impl_args:
            names = ", ".join(sorted(extra_impl_args))
            raise UnsupportedRequestError(
                f"{type(self).__name__} does not know the argument {names}; remove it, or choose the backend it belongs to"
            )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("num_heads", num_heads), ("head_size", head_size), ("num_kv_heads", num_kv_heads)):
            if not isinstance(value, int) or value < 1:
                raise UnsupportedRequestError(f"{type(self).__name__}: {name} must be an integer >= 1, got {value!r}")
        if num_heads % num_kv_heads:
            raise UnsupportedRequestError(
                f"{type(self).__name__}: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}"
            )
        scale = head_size**-0.5 if softmax_scale is None else float(softmax_scale)
        if not math.isfinite(scale):
            raise UnsupportedRequestError(f"{type(self).__name__}: softmax_scale must be finite, got {softmax_scale!r}")
        self.num_heads = num_heads
        self.head_size = head_size
        self.softmax_scale = scale
        self.causal = causal
        self.num_kv_heads = num_kv_heads
        self.prefix = prefix
        self.head_range = (0, num_heads)
        self.total_num_heads = num_heads

    def set_head_range(self, first: int, last: int, *, total: int) -> None:
        """Learn which heads of the layer this impl computes: [first, last) of `total`; the rest is on other ranks.

        Called after construction and only under sequence parallelism, where `num_heads` is this rank's share.
        """
        self.head_range = (first, last)
        self.total_num_heads = total

    def of_heads(self, first: int, last: int) -> Self:
        """Return an impl for some of this one's heads, with the same parameters: [first, last) of the layer's.

        Called after `set_head_range`, where the heads of a rank are attended to group by group. This one is a copy that shares
        what the impl holds and knows its range; an impl that holds something per head overrides it.
        """
        part = copy.copy(self)
        part.num_heads = last - first
        part.num_kv_heads = part.num_heads * self.num_kv_heads // self.num_heads
        part.set_head_range(first, last, total=self.total_num_heads)
        return part

    def preprocess_qkv(self, qkv: torch.Tensor, attn_metadata: T | None) -> torch.Tensor:
        """Rearrange q, k or v before attention; the same on each, independent of the batch. Identity by default.

        Args:
            qkv: `[N, S, H, D]`: one of q, k, v, or several stacked along the batch.
            attn_metadata: Metadata of this forward pass.
        """
        return qkv

    def postprocess_output(self, output: torch.Tensor, attn_metadata: T | None) -> torch.Tensor:
        """Undo on the output `[B, S, H, D]` what `preprocess_qkv` did to the queries. Identity by default."""
        return output

    @abstractmethod
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: T | None
    ) -> torch.Tensor:
        """Return the attention output.

        A backend's own tensor inputs are keyword-only parameters, declared in `Capabilities.extra_inputs`. With the
        capability `returns_lse` there is a keyword `return_lse=False`; True gives `(output, lse)`, lse `[B, H, S_q]`
        float32, natural logarithm, -inf for a query with nothing to attend (its output is 0).

        Args:
            query: `[B, S_q, H, D]`, D contiguous, otherwise any strides; not modified.
            key: `[B, S_k, H_kv, D]`, likewise.
            value: `[B, S_k, H_kv, D]`, likewise.
            attn_metadata: Metadata of this forward pass, or None.

        Returns:
            `[B, S_q, H, D]` in the dtype of `query`.
        """

    def attend_part(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: T | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return attention over some of the keys, to be merged with that over the others.

        What a backend that declares the strategy "ring" or "usp" has to have. `forward` with `return_lse=True` does, except
        that its log-sum-exp is float32 for float64 inputs too: a backend can override this to give it in float64.

        Args:
            query: `[B, S_q, H, D]`, S_q >= 1; likewise below, D contiguous and otherwise any strides.
            key: `[B, S_k, H_kv, D]`, S_k >= 1.
            value: `[B, S_k, H_kv, D]`.
            attn_metadata: Metadata of this forward pass, or None.

        Returns:
            `[B, S_q, H, D]` and the log-sum-exp `[B, H, S_q]`, without gradients.
        """
        output, lse = self.forward(query, key, value, attn_metadata, return_lse=True)  # type: ignore[call-arg]
        return output, lse

    def part_gradients(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        attn_metadata: T | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what some of the keys contribute to the gradients of attention over all of them.

        The softmax weights of the part are `exp(score - lse)`, and its score gradients `weight * (grad . value - grad .
        output)`: with output and log-sum-exp over all keys, a flash backward computes just that, and a backend that can call
        its own overrides this. The method here needs only `attend_part` and the gradients of `forward`, for which it runs each
        twice: with the part's own output `o` and `c = weight of the part * grad . (o - output)`, what is missing are `scale *
        c` times the attention of q to k in place of v, and the gradient of that for q.

        Args:
            grad: `[B, S_q, H, D]`, of the output over all keys; any strides.
            query: `[B, S_q, H, D]`.
            key: `[B, S_k, H_kv, D]`, the part's.
            value: `[B, S_k, H_kv, D]`.
            output: `[B, S_q, H, D]`, over all keys.
            lse: `[B, H, S_q]`, over all keys; float32, or float64 for float64 inputs.
            attn_metadata: Metadata of the forward pass, or None.

        Returns:
            Gradients of query, key and value, in their dtypes or in float32.
        """
        import torch

        with torch.enable_grad():
            q, k, v, keys = (x.detach().requires_grad_() for x in (query, key, value, key))
            part, part_lse = self.attend_part(q, k, v, attn_metadata)
            mean_key = self.forward(query.detach(), key.detach(), keys, attn_metadata)
        # a query that sees no key at all has no weight here either
        weight = torch.exp(part_lse - lse.masked_fill(lse == float("-inf"), float("inf"))).transpose(1, 2)[..., None]
        upstream = grad * weight
        missing = self.softmax_scale * (upstream * (part.detach() - output)).sum(-1, keepdim=True)
        of_q, of_k, of_v = torch.autograd.grad(part, (q, k, v), upstream.to(part.dtype))
        (of_keys,) = torch.autograd.grad(mean_key, (keys,), (missing * query).to(mean_key.dtype))
        return of_q + missing * mean_key.detach(), of_k + of_keys, of_v


# bounds that `LayerPlace` tabulates; beyond, a compiled model has a graph for every layer
_MOST_LAYERS = 256


class LayerPlace:
    """Where a layer stands in its model, for impls that act by it: claims that compiled layers can share.

    An integer that a module holds is a constant to torch.compile. Comparing a layer's index therefore makes one graph for
    each layer, and a model has more of those than torch compiles. Here the comparisons are in a list, of which torch
    guards on the entries that are read, so that layers of which the same is true share a graph.

    Args:
        index: The layer's index, from 0; None = not known, of which no claim is true.

    Attributes:
        is_known: Whether the index is known.
    """

    def __init__(self, index: int | None) -> None:
        self.is_known = index is not None
        self._index = index
        self._reaches = [index is not None and index >= bound for bound in range(_MOST_LAYERS)]

    def is_within(self, first: int, last: int) -> bool:
        """Whether the layer is one of those from first to last, both included and >= 0."""
        if last + 1 < _MOST_LAYERS:
            return self._reaches[first] and not self._reaches[last + 1]
        return self._index is not None and first <= self._index <= last


def layer_index(prefix: str, layer_idx: int | None = None) -> int | None:
    """Return the index of a layer, for impls that act by it.

    Args:
        prefix: Name of the layer in its model; the number after a component "blocks" is the index.
        layer_idx: The index itself, >= 0, instead.

    Returns:
        The index, from 0; None if neither says it.

    Raises:
        UnsupportedRequestError: `layer_idx` is not an integer >= 0.
    """
    if layer_idx is None:
        found = re.search(r"(?:^|\.)blocks\.(\d+)(?:\.|$)", prefix)
        return int(found[1]) if found else None
    if not isinstance(layer_idx, int) or isinstance(layer_idx, bool) or layer_idx < 0:
        raise UnsupportedRequestError(f"layer_idx={layer_idx!r} must be an integer >= 0")
    return layer_idx
