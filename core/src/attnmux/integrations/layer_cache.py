"""Attention layers for functions that are called with tensors only, as other libraries' registries do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnmux.errors import UnsupportedRequestError
from attnmux.layers import LocalAttention
from attnmux.selector import select_backend
from attnmux.spec import AttentionRequest

if TYPE_CHECKING:
    from attnmux.spec import AttentionBackendEnum, BackendSpec

__all__ = ["LayerCache", "stateless_spec"]


def stateless_spec(backend: AttentionBackendEnum | str) -> BackendSpec:
    """Return a backend's spec, if a function of q, k, v and a mask can serve it.

    Raises:
        UnsupportedRequestError: It has parameters, or needs metadata, for which a bare function has no place.
    """
    from attnmux.registry import get_registry

    spec = get_registry().spec(backend)
    for is_so, what in (
        (spec.capabilities.trainable_parameters, "has parameters of its own"),
        (spec.capabilities.needs_metadata, "needs metadata of every forward pass"),
    ):
        if is_so:
            raise UnsupportedRequestError(
                f"{spec.name} {what}, for which a registry of plain functions has no place; use "
                "attnmux.integrations.diffusers.apply, or attnmux.LocalAttention in the model"
            )
    return spec


class LayerCache:
    """Makes one layer per kind of call, at the first such call."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._layers: dict[tuple[object, ...], LocalAttention] = {}

    def layer(self, q: torch.Tensor, k: torch.Tensor, *, scale: float | None, causal: bool) -> LocalAttention:
        """Return the layer for q and k `[B, S, H, D]`.

        Raises:
            UnsupportedRequestError: The backend cannot serve the call; or it is the first of its kind and is being compiled.
        """
        key = (q.shape[2], q.shape[3], k.shape[2], scale, causal, q.dtype, q.device)
        layer = self._layers.get(key)
        if layer is not None:
            return layer
        if torch.compiler.is_compiling():
            raise UnsupportedRequestError(
                f"{self.backend} has not been selected for heads {key[:3]}, scale={scale}, causal={causal}, {q.dtype} yet, and "
                "selection does not trace: run the model once before torch.compile"
            )
        request = AttentionRequest(
            head_size=q.shape[3],
            dtype=str(q.dtype),
            device=str(q.device),
            causal=causal,
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            softmax_scale=scale,
        )
        select_backend(request, backend=self.backend)
        layer = LocalAttention(
            q.shape[2], q.shape[3], k.shape[2], scale, causal, backend=self.backend, dtype=q.dtype, prefix=self.backend
        )
        self._layers[key] = layer
        return layer
