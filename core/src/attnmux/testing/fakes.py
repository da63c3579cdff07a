"""Backends that exist in this process only: a right one, and the means to register any other.

with installed(BackendSpec("FAKE_ATTN", target="-:-", ...), FakeBackend):
layer = LocalAttention(4, 32, backend="FAKE_ATTN")
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnmux.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    DenseMetadataBuilder,
)
from attnmux.registry import BACKENDS_GROUP, get_registry
from attnmux.spec import BackendSpec, Capabilities

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "FAKE_CAPABILITIES",
    "FakeBackend",
    "FakeDistribution",
    "FakeEntryPoint",
    "FakeImpl",
    "installed",
    "make_backend",
]

FAKE_CAPABILITIES = Capabilities(
    dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
    head_sizes=range(1, 1025),
    devices=frozenset({"cpu", "cuda"}),
    cuda_archs=frozenset({"any"}),
    causal=True,
    gqa=True,
    cross_attention=True,
    masks=frozenset({"bool", "additive", "key_padding"}),
    softmax_scale=True,
    backward=True,
    deterministic=True,
    returns_lse=True,
    exactness="exact",
    compile="fullgraph",
    sequence_parallel=frozenset({"ulysses", "ring", "usp", "allgather_kv"}),
    extra_inputs=frozenset({"attn_mask"}),
)
"""Capabilities of `FakeBackend`."""


class FakeImpl(AttentionImpl[AttentionMetadata]):
    """Dense attention in plain torch with every score in memory: every option of the contract, any device.

    Numerics: computed in float32 for half precision inputs, else in the dtype of the inputs.
    """

    def forward(  # type: ignore[override]  # with return_lse=True there are two results
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the output `[B, S_q, H, D]`, with `return_lse=True` also the LSE `[B, H, S_q]`.

        Args:
            query: `[B, S_q, H, D]`.
            key: `[B, S_k, H_kv, D]`.
            value: `[B, S_k, H_kv, D]`.
            attn_metadata: Not read.
            attn_mask: Bool (True = attend) or additive floating point, broadcastable to `[B, H, S_q, S_k]`.
            return_lse: Whether to return the log-sum-exp of the scaled scores.
        """
        output, lse = self.compute(query, key, value, attn_mask)
        return (output, lse.to(torch.float32).detach()) if return_lse else output

    def attend_part(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp, the latter in float64 for float64 inputs."""
        output, lse = self.compute(query, key, value)
        return output, lse.detach()

    def compute(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp, the latter in the dtype of the computation and with its gradient."""
        compute_dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.to(compute_dtype).transpose(1, 2) for x in (query, key, value))  # [B, H, S, D]
        group = self.num_heads // self.num_kv_heads
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * self.softmax_scale
        hidden = self._hidden(scores, attn_mask)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            scores = scores + attn_mask.to(compute_dtype)
        empty = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden, float("-inf")).masked_fill(empty, 0.0)
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        output = (weights @ v).to(query.dtype).transpose(1, 2)
        return output, scores.logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))

    def _hidden(self, scores: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        """Return which scores do not count, `[B, H, S_q, S_k]`."""
        hidden = torch.zeros_like(scores, dtype=torch.bool)
        if self.causal:
            length_q, length_k = scores.shape[-2:]
            hidden = hidden | torch.ones_like(hidden[0, 0]).triu(1 + length_k - length_q)
        if attn_mask is not None:
            hidden = hidden | (~attn_mask if attn_mask.dtype == torch.bool else attn_mask == float("-inf"))
        return hidden


def make_backend(
    name: str,
    impl_cls: type[AttentionImpl[Any]] = FakeImpl,
    *,
    metadata_cls: type[AttentionMetadata] = AttentionMetadata,
    builder_cls: type[AttentionMetadataBuilder[Any]] = DenseMetadataBuilder,
    head_sizes: tuple[int, ...] = (),
) -> type[AttentionBackend]:
    """Return a backend class that names the given classes."""
    methods = {
        "get_name": lambda: name,
        "get_impl_cls": lambda: impl_cls,
        "get_metadata_cls": lambda: metadata_cls,
        "get_builder_cls": lambda: builder_cls,
        "get_supported_head_sizes": lambda: list(head_sizes),
    }
    return type("MadeBackend", (AttentionBackend,), {key: staticmethod(value) for key, value in methods.items()})


FakeBackend = make_backend("FAKE_ATTN")
"""A backend that does everything right: FAKE_ATTN, with `FAKE_CAPABILITIES`."""


@dataclass(frozen=True)
class FakeDistribution:
    """An installed distribution, as far as discovery reads one."""

    name: str = "attnmux-fake"
    version: str = "0.0"


@dataclass(eq=False)
class FakeEntryPoint:
    """An entry point that returns an object, or raises it if it is an exception.

    Attributes:
        name: Key: the backend's name.
        result: What `load` returns or raises.
        value: "module:attribute" as the metadata would say.
        group: Entry-point group.
        dist: Who ships it.
    """

    name: str
    result: object
    value: str = "attnmux_fake.plugin:SPEC"
    group: str = BACKENDS_GROUP
    dist: Any = dataclasses.field(default_factory=FakeDistribution)

    def load(self) -> Any:
        """Return the result, or raise it."""
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


_module_numbers = itertools.count()


@contextmanager
def installed(
    spec: BackendSpec, backend_cls: type[AttentionBackend], *, distribution: FakeDistribution | None = None
) -> Iterator[BackendSpec]:
    """Register a backend class inside the block, as if a distribution had been installed.

    Args:
        spec: Its spec; `target` is replaced.
        backend_cls: Its class.
        distribution: Who ships it; None = "attnmux-fake 0.0".

    Yields:
        The spec with the target under which the class is found.
    """
    module = types.ModuleType(f"_attnmux_fake_{next(_module_numbers)}")
    module.Backend = backend_cls  # type: ignore[attr-defined]
    spec = dataclasses.replace(spec, target=f"{module.__name__}:Backend")
    point = FakeEntryPoint(spec.name, spec, f"{module.__name__}:SPEC", dist=distribution or FakeDistribution())
    sys.modules[module.__name__] = module
    try:
        with get_registry().temporary_entry_points([point]):
            yield spec
    finally:
        del sys.modules[module.__name__]
