"""TORCH_SDPA: PyTorch's scaled dot-product attention, with the fastest of torch's own kernels for the request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata, DenseMetadataBuilder
from attnmux.backends.dense import with_positive_scale
from attnmux.errors import UnsupportedRequestError

if TYPE_CHECKING:
    from attnmux.spec import AttentionRequest

__all__ = ["SDPABackend", "SDPAImpl"]

_HALF = ("float16", "bfloat16")


class _Call(NamedTuple):
    """One call in torch's layout.

    Attributes:
        q: `[B, H, S_q, D]`.
        k: `[B, H_kv, S_k, D]`.
        v: `[B, H_kv, S_k, D]`.
        mask: Bool or additive; no row of it is empty.
        empty: Bool, broadcastable to `[B, H, S_q, 1]`: queries that see no key; None without a mask.
        is_causal: Whether the kernel masks causally, first query and first key aligned.
        scale: Factor on the scores, > 0.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    empty: torch.Tensor | None
    is_causal: bool
    scale: float


class SDPAImpl(AttentionImpl[AttentionMetadata]):
    """Exact attention for any head size, dtype, mask and device.

    Masks come as the keyword `attn_mask`: bool (True = attend) or additive floating point, broadcastable to
    `[B, H, S_q, S_k]`; key padding is the bool form `[B, 1, 1, S_k]`. A mask and `causal` combine. A query with nothing
    to attend gives zeros, and zero gradients. The log-sum-exp carries no gradient.

    Numerics: torch's; half precision inputs accumulate in float32.
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
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra_impl_args)
        self._prefers_cudnn = frozenset(
            dtype
            for dtype in (torch.float16, torch.bfloat16)
            if torch.cuda.is_available() and _prefers_cudnn(head_size, str(dtype).removeprefix("torch."))
        )

    def forward(  # type: ignore[override]
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
            attn_mask: See the class.
            return_lse: Whether to return the log-sum-exp of the scaled scores: float32, natural logarithm, -inf for a
                query with nothing to attend.

        Raises:
            UnsupportedRequestError: The mask has a dtype, shape or device that does not fit, or requires gradients where
                the LSE is asked for.
        """
        call = self._prepare(query, key, value, attn_mask)
        learns_mask = attn_mask is not None and attn_mask.requires_grad
        if return_lse:
            if learns_mask:
                raise UnsupportedRequestError(
                    "attn_mask requires gradients, which torch's kernels with log-sum-exp do not compute; detach it, or "
                    "leave out return_lse"
                )
            output, lse = self._attend_with_lse(call)
        elif self._uses_cudnn(call) and not learns_mask:
            output = self._cudnn(call)[0]
        else:
            output = F.scaled_dot_product_attention(
                call.q,
                call.k,
                call.v,
                attn_mask=call.mask,
                is_causal=call.is_causal,
                scale=call.scale,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )
        if call.empty is not None:
            output = output.masked_fill(call.empty, 0.0)
        output = output.transpose(1, 2)
        if not return_lse:
            return output
        if call.empty is not None:
            lse = lse.masked_fill(call.empty[..., 0], float("-inf"))
        return output, lse.detach().to(torch.float32)

    def attend_part(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp, the latter in float64 for float64 inputs; see `AttentionImpl`."""
        call = self._prepare(query, key, value, None)
        output, lse = self._attend_with_lse(call)
        if call.empty is not None:
            output = output.masked_fill(call.empty, 0.0)
            lse = lse.masked_fill(call.empty[..., 0], float("-inf"))
        return output.transpose(1, 2), lse

    def part_gradients(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients by the backward of the kernel that `attend_part` runs; see `AttentionImpl`."""
        call = self._prepare(query, key, value, None)
        grad, output = grad.transpose(1, 2), output.transpose(1, 2)
        if call.empty is not None:
            grad = grad.masked_fill(call.empty, 0.0)
        # weights are exp(score - lse): none where no key is seen
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        grads = self._gradients(call, grad, output, lse)
        # `_prepare` may have turned the sign of the queries, or put zeros in their place
        factor = 1.0 if self.softmax_scale > 0.0 else -1.0 if self.softmax_scale < 0.0 else 0.0
        grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
        return grad_q if factor == 1.0 else grad_q * factor, grad_k, grad_v

    def _gradients(
        self, call: _Call, grad: torch.Tensor, output: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of a call's q, k and v, given output and log-sum-exp of a softmax over more keys."""
        q, k, v = call.q, call.k, call.v
        bias = None if call.mask is None else _bias(call)
        # of dropout, which there is none of
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        if self._uses_cudnn(call):
            of_cudnn: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
                torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                    grad, q, k, v, output, lse[..., None], seed, seed, bias, None, None, q.shape[2], k.shape[2], 0.0,
                    call.is_causal, scale=call.scale,
                )
            )  # fmt: skip
            return of_cudnn
        group = self.num_heads // self.num_kv_heads
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if q.device.type == "cpu":
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, output, lse, 0.0, call.is_causal, attn_mask=bias, scale=call.scale
            )
        elif q.dtype == torch.float64:
            grads = _explicit_gradients(call._replace(k=k, v=v), grad, output, lse)
        else:
            # the memory-efficient kernel pads the rows of its LSE
            lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
            grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, bias, output, lse, seed, seed, 0.0, [True, True, True, False], call.is_causal,
                scale=call.scale,
            )[:3]  # fmt: skip
        grad_q, grad_k, grad_v = grads
        if group > 1:
            grad_k, grad_v = (x.unflatten(1, (-1, group)).sum(2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v

    def _prepare(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> _Call:
        length_q, length_k = query.shape[1], key.shape[1]
        if mask is not None:
            mask = _checked_mask(mask, query, length_k)
        is_causal = self.causal
        if is_causal and (mask is not None or length_q != length_k):
            # torch aligns the first query with the first key; the contract aligns the last ones
            visible = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device).tril(length_k - length_q)
            if mask is None:
                mask = visible
            elif mask.dtype == torch.bool:
                mask = mask & visible
            else:
                mask = mask.masked_fill(~visible, float("-inf"))
            is_causal = False
        empty = None
        if mask is not None:
            # Some kernels give NaN for a row without keys. Such a row sees every key instead, and its output is set to
            # zero afterwards, which sends zero gradients back.
            if mask.dtype == torch.bool:
                empty = ~mask.any(-1, keepdim=True)
                mask = mask | empty
            else:
                empty = (mask == float("-inf")).all(-1, keepdim=True)
                mask = mask.masked_fill(empty, 0.0)
        query, scale = with_positive_scale(query, self.softmax_scale)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return _Call(q, k, v, mask, empty, is_causal, scale)

    def _uses_cudnn(self, call: _Call) -> bool:
        # cuDNN refuses sequences of one token
        return call.q.is_cuda and call.q.dtype in self._prefers_cudnn and call.q.shape[2] > 1 and call.k.shape[2] > 1

    def _cudnn(self, call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
        bias = None if call.mask is None else _bias(call)
        # the log-sum-exp is asked for in any case: backward reads it, and writing it costs nothing measurable
        output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            call.q, call.k, call.v, bias, True, 0.0, call.is_causal, False, scale=call.scale
        )[:2]
        return output, lse.reshape(call.q.shape[:3])

    def _attend_with_lse(self, call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
        if self._uses_cudnn(call):
            return self._cudnn(call)
        q, k, v = call.q, call.k, call.v
        if self.num_heads != self.num_kv_heads:
            k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k, v))
        bias = None if call.mask is None else _bias(call)
        if q.device.type == "cpu":
            output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, call.is_causal, attn_mask=bias, scale=call.scale
            )
        elif q.dtype == torch.float64:
            output, lse = _explicit(q, k, v, bias, call.is_causal, call.scale)
        else:
            output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, True, 0.0, call.is_causal, scale=call.scale
            )[:2]
        # the memory-efficient kernel pads the rows of its LSE
        return output, lse[..., : q.shape[2]]


def _bias(call: _Call) -> torch.Tensor:
    """Return the mask as an additive one of the kernels' full shape `[B, H, S_q, S_k]`."""
    mask = call.mask
    assert mask is not None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=call.q.dtype).masked_fill(~mask, float("-inf"))
    length = mask.shape[-1]
    if length % 16:
        # the memory-efficient kernel wants rows that start at multiples of 16 elements
        mask = F.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(*call.q.shape[:3], length)


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with all scores in memory: float64 on CUDA, for which torch has no fused kernel."""
    scores = _scores(q, k, bias, is_causal, scale)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1) @ v, lse


def _explicit_gradients(
    call: _Call, grad: torch.Tensor, output: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for `_explicit`, given output and log-sum-exp of a softmax over more keys."""
    bias = None if call.mask is None else _bias(call)
    weights = torch.exp(_scores(call.q, call.k, bias, call.is_causal, call.scale) - lse[..., None])
    of_scores = weights * (grad @ call.v.transpose(-1, -2) - (grad * output).sum(-1, keepdim=True)) * call.scale
    return of_scores @ call.k, of_scores.transpose(-1, -2) @ call.q, weights.transpose(-1, -2) @ grad


def _scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, is_causal: bool, scale: float) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def _checked_mask(mask: torch.Tensor, query: torch.Tensor, length_k: int) -> torch.Tensor:
    batch, length_q, heads = query.shape[:3]
    full = (batch, heads, length_q, length_k)
    if mask.device != query.device:
        raise UnsupportedRequestError(f"attn_mask is on {mask.device}, q on {query.device}; move it there")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise UnsupportedRequestError(
            f"attn_mask must be bool (True = attend) or additive floating point, got {mask.dtype}; for 0/1 masks use .bool()"
        )
    if mask.dim() not in (2, 4) or any(
        have not in (1, want) for have, want in zip(reversed(mask.shape), reversed(full), strict=False)
    ):
        raise UnsupportedRequestError(
            f"attn_mask must broadcast to [batch, heads, S_q, S_k] = {list(full)}, got {list(mask.shape)}; key padding is "
            f"[{batch}, 1, 1, {length_k}]"
        )
    return mask if mask.dtype == torch.bool else mask.to(query.dtype)


def _prefers_cudnn(head_size: int, dtype: str, arch: int | None = None) -> bool:
    """Whether cuDNN's kernel is the fastest for half precision on the current device: benchmarks/results/sdpa_kernels.json."""
    if dtype not in _HALF or not torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]
        return False
    # cuDNN's backward adds with atomics
    if torch.are_deterministic_algorithms_enabled():
        return False
    if arch is None:
        major, minor = torch.cuda.get_device_capability()
        arch = major * 10 + minor
    return arch == 90 and head_size % 8 == 0 and head_size <= 256


class SDPABackend(AttentionBackend):
    """PyTorch's scaled dot-product attention."""

    @staticmethod
    def get_name() -> str:
        """Return "TORCH_SDPA"."""
        return "TORCH_SDPA"

    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        """Return SDPAImpl."""
        return SDPAImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """Return AttentionMetadata: nothing is needed."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[DenseMetadataBuilder]:
        """Return the builder of the bare metadata."""
        return DenseMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return an empty list: any."""
        return []

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return which of torch's kernels would run, and why."""
        if request.device_type != "cuda" or not torch.cuda.is_available():
            return f"torch {torch.__version__}, its kernel for {request.device_type}"
        if _prefers_cudnn(request.head_size, request.dtype):
            return f"torch {torch.__version__}, cuDNN kernel (sm_90, {request.dtype}: the fastest measured)"
        return f"torch {torch.__version__}, torch's own choice among its kernels"
