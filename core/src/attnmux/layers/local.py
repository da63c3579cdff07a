"""Attention within one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnmux.backend import AttentionImpl
from attnmux.context import active_attn_metadata
from attnmux.errors import UnsupportedRequestError
from attnmux.rotary import apply_rotary
from attnmux.selector import current_device, select_backend
from attnmux.spec import AttentionBackendEnum, AttentionRequest, backend_name_to_enum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnmux.backend import AttentionMetadata

__all__ = ["LocalAttention"]


class LocalAttention(nn.Module):
    """Attention over the tokens at hand, by the backend that is selected when the layer is built.

    Args:
        num_heads: Query heads, >= 1.
        head_size: Channels of one head, >= 1.
        num_kv_heads: Key and value heads, a divisor of `num_heads`; None = `num_heads`.
        softmax_scale: Factor on the scores; None = `head_size ** -0.5`; 0.0 is a value.
        causal: Whether a query sees only keys up to its own position, the last query aligned with the last key.
        supported_attention_backends: Backends this layer allows; None = every one.
        backend: Explicit choice, by member or name.
        default_backend: Preference of the layer's author, which users override.
        dtype: Of q, k and v, for the selection; None = torch's default dtype.
        prefix: Name of the layer in its model; backends that act by layer index read it.
        **extra_impl_args: Arguments of the backend's own; it refuses by name those it does not know.

    Attributes:
        attn_impl: The backend's impl; a submodule if it has parameters.
        backend: The enum member, None for an out-of-tree backend.
        backend_name: Its name.
        dtype: The dtype the selection used.
        selection: The selection with its report: `layer.selection.explain()`.

    Raises:
        AttnmuxError: The selection failed, or the backend refuses an argument; see `select_backend`.
    """

    backend: AttentionBackendEnum | None
    attn_impl: AttentionImpl[Any]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        supported_attention_backends: Sequence[AttentionBackendEnum | str] | None = None,
        *,
        backend: AttentionBackendEnum | str | None = None,
        default_backend: AttentionBackendEnum | str | None = None,
        dtype: torch.dtype | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
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
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            **extra_impl_args,
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

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        freqs_cis: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        attn_metadata: AttentionMetadata | None = None,
        **extra_inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention output.

        Args:
            q: `[B, S_q, H, D]`, D contiguous, otherwise any strides; a dtype and device the backend declares.
            k: `[B, S_k, H_kv, D]`, likewise, same dtype and device.
            v: `[B, S_k, H_kv, D]`, likewise.
            freqs_cis: (cos, sin), each `[S, D/2]` or `[S, D]`: rotary embedding of q and k (GPT-J pairs); None = none.
            attn_metadata: Metadata of this pass; None = that of the forward context, if one is set and its metadata are
                of the backend's class.
            **extra_inputs: The backend's own tensors, such as `attn_mask` or `gate_compress`; None counts as not given.

        Returns:
            `[B, S_q, H, D]` in the dtype of q.

        Raises:
            UnsupportedRequestError: Shapes, dtypes, devices, metadata or extra inputs that do not fit, or that the
                backend does not declare; names the argument, what was expected and what came.
        """
        self._check(q, k, v)
        if freqs_cis is not None:
            q, k = apply_rotary(q, freqs_cis), apply_rotary(k, freqs_cis)
        if attn_metadata is None:
            # a context may carry the metadata of another layer's backend; this layer's then has none
            active = active_attn_metadata()
            metadata = active if isinstance(active, self._metadata_cls) else None
        elif isinstance(attn_metadata, self._metadata_cls):
            metadata = attn_metadata
        else:
            raise UnsupportedRequestError(
                f"attn_metadata must be a {self._metadata_cls.__name__} for {self.backend_name}, got "
                f"{type(attn_metadata).__name__}; build it with that backend's metadata builder"
            )
        if extra_inputs:
            extra_inputs = self._checked_extra_inputs(extra_inputs)
        impl = self.attn_impl
        if self._preprocesses:
            q, k, v = (impl.preprocess_qkv(x, metadata) for x in (q, k, v))
        output = impl.forward(q, k, v, metadata, **extra_inputs)
        return impl.postprocess_output(output, metadata) if self._postprocesses else output

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
