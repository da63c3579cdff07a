"""Attention within one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnmux.layers.base import AttentionLayer
from attnmux.rotary import apply_rotary

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from attnmux.backend import AttentionMetadata
    from attnmux.spec import AttentionBackendEnum

__all__ = ["LocalAttention"]


class LocalAttention(AttentionLayer):
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
        super().__init__(
            num_heads,
            head_size,
            num_kv_heads,
            softmax_scale,
            causal,
            supported_attention_backends,
            backend=backend,
            default_backend=default_backend,
            dtype=dtype,
            prefix=prefix,
            impl_heads=(num_heads, num_kv_heads),
            sp_size=1,
            impl_args=extra_impl_args,
        )

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
        metadata = self._metadata(attn_metadata)
        if extra_inputs:
            extra_inputs = self._checked_extra_inputs(extra_inputs)
        impl = self.attn_impl
        if self._preprocesses:
            q, k, v = (impl.preprocess_qkv(x, metadata) for x in (q, k, v))
        output = impl.forward(q, k, v, metadata, **extra_inputs)
        return impl.postprocess_output(output, metadata) if self._postprocesses else output
