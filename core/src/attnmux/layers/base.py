"""What attention layers within one process and over several have in common: construction and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnmux.backend import AttentionImpl
from attnmux.context import active_attn_metadata
from attnmux.errors import UnsupportedRequestError
from attnmux.selector import current_device, select_backend
from attnmux.spec import AttentionBackendEnum, AttentionRequest, backend_name_to_enum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnmux.backend import AttentionMetadata

__all__ = ["AttentionLayer"]


class AttentionLayer(nn.Module):
    """A layer with the backend that was selected when it was built; arguments and attributes are `LocalAttention`'s.

    Three more: `impl_heads`, the query and key heads the impl is built for; `sp_size`, the ranks that share a sequence; and
    `sp_strategy`, how.
    """

    backend: AttentionBackendEnum | None
    attn_impl: AttentionImpl[Any]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None,
        softmax_scale: float | None,
        causal: bool,
        supported_attention_backends: Sequence[AttentionBackendEnum | str] | None,
        *,
        backend: AttentionBackendEnum | str | None,
        default_backend: AttentionBackendEnum | str | None,
        dtype: torch.dtype | None,
        prefix: str,
        impl_heads: tuple[int, int | None],
        sp_size: int,
        impl_args: dict[str, Any],
        sp_strategy: str = "ulysses",
    ) -> None:
        super().__init__()
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        request = AttentionRequest(
            head_size=head_size,
            dtype=str(self.dtype),
            device=current_device(),
            causal=causal,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            softmax_scale=softmax_scale,
            sp_size=sp_size,
            sp_strategy=sp_strategy,
        )
        self.selection = select_backend(
            request, backend=backend, supported=supported_attention_backends, default_backend=default_backend
        )
        self.backend_name = self.selection.spec.name
        self.backend = backend_name_to_enum(self.backend_name)
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.attn_impl = self.selection.backend_class.get_impl_cls()(
            num_heads=impl_heads[0],
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=impl_heads[1],
            prefix=prefix,
            **impl_args,
        )
        capabilities = self.selection.spec.capabilities
        self._dtypes = frozenset(getattr(torch, name) for name in capabilities.dtypes)
        self._devices = capabilities.devices
        self._extra_inputs = capabilities.extra_inputs
        self._allows_backward = capabilities.backward
        self._metadata_cls = self.selection.backend_class.get_metadata_cls()
        impl_cls = type(self.attn_impl)
        self._preprocesses = impl_cls.preprocess_qkv is not AttentionImpl.preprocess_qkv
        self._postprocesses = impl_cls.postprocess_output is not AttentionImpl.postprocess_output

    def _metadata(self, attn_metadata: AttentionMetadata | None) -> AttentionMetadata | None:
        """Return the metadata that the impl gets: the argument, or the context's."""
        if attn_metadata is None:
            # a context may carry the metadata of another layer's backend; this layer's then has none
            active = active_attn_metadata()
            return active if isinstance(active, self._metadata_cls) else None
        if not isinstance(attn_metadata, self._metadata_cls):
            raise UnsupportedRequestError(
                f"attn_metadata must be a {self._metadata_cls.__name__} for {self.backend_name}, got "
                f"{type(attn_metadata).__name__}; build it with that backend's metadata builder"
            )
        return attn_metadata

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Refuse tensors that the impl must not see."""
        # one look at each property: together they cost more than all comparisons
        shape, shape_k = q.shape, k.shape
        if (
            len(shape) != 4
            or len(shape_k) != 4
            or shape[2] != self.num_heads
            or shape[3] != self.head_size
            or shape_k[0] != shape[0]
            or shape_k[2] != self.num_kv_heads
            or shape_k[3] != self.head_size
            or v.shape != shape_k
        ):
            self._refuse_shapes(q, k, v)
        dtype = q.dtype
        if dtype not in self._dtypes or k.dtype is not dtype or v.dtype is not dtype:
            declared = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self._dtypes))
            raise UnsupportedRequestError(
                f"q, k and v must have one dtype of those that {self.backend_name} declares ({declared}), got {q.dtype}, "
                f"{k.dtype}, {v.dtype}; cast them, or choose another backend"
            )
        device = q.device
        if device.type not in self._devices or k.device != device or v.device != device:
            raise UnsupportedRequestError(
                f"q, k and v must be on one device of those that {self.backend_name} declares "
                f"({', '.join(sorted(self._devices))}), got {q.device}, {k.device}, {v.device}"
            )
        if (
            not self._allows_backward
            and torch.is_grad_enabled()
            and (q.requires_grad or k.requires_grad or v.requires_grad)
        ):
            raise UnsupportedRequestError(
                f"{self.backend_name} computes no gradients, and q, k or v require them; run it under torch.no_grad(), or "
                "choose a backend with backward"
            )

    def _refuse_shapes(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for name, x, heads in (("q", q, self.num_heads), ("k", k, self.num_kv_heads), ("v", v, self.num_kv_heads)):
            if x.dim() != 4 or x.shape[2] != heads or x.shape[3] != self.head_size:
                raise UnsupportedRequestError(
                    f"{name} must be [B, S, {heads}, {self.head_size}] = [batch, sequence, heads, head_size], got "
                    f"{list(x.shape)}"
                )
        raise UnsupportedRequestError(
            f"k and v must agree, and have the batch size of q {q.shape[0]}: got k {list(k.shape)}, v {list(v.shape)}"
        )

    def _checked_extra_inputs(self, extra_inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        given: dict[str, torch.Tensor | None] = {
            name: value for name, value in extra_inputs.items() if value is not None
        }
        unknown = sorted(set(extra_inputs) - self._extra_inputs)
        if unknown:
            declared = ", ".join(sorted(self._extra_inputs)) or "none"
            raise UnsupportedRequestError(
                f"{self.backend_name} does not take {', '.join(unknown)} (extra inputs it declares: {declared}); leave it "
                "out, or choose a backend that takes it"
            )
        return given

    def extra_repr(self) -> str:
        """Return what `print(layer)` shows: the backend and the sizes."""
        return f"backend={self.backend_name}, num_heads={self.num_heads}, head_size={self.head_size}"
