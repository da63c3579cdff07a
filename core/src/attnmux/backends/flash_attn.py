"""FLASH_ATTN: flash-attn 4, 3 or 2, whichever is installed and fits the device.

Sources: flash-attn-4 4.0.0b36 (`flash_attn.cute`), flash-attn 3 (`flash_attn_interface`), flash-attn 2.7 and later
(`flash_attn`). All align a causal mask with the last query and key. Versions 2 and 3 register custom operators of their
own; version 4 does not, so that it is wrapped in one here, which lets it trace under `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder
from attnmux.backends.dense import with_positive_scale
from attnmux.errors import BackendUnavailableError, UnsupportedRequestError
from attnmux.spec import Reason

if TYPE_CHECKING:
    from attnmux.spec import AttentionRequest

__all__ = ["FlashAttentionBackend", "FlashAttentionImpl", "FlashAttentionMetadata", "FlashAttentionMetadataBuilder"]


@dataclass
class FlashAttentionMetadata(AttentionMetadata):
    """Packed sequences: q, k and v then are `[1, total, H, D]`, one sequence behind the other.

    Attributes:
        current_timestep: Index of the denoising step, from 0.
        cu_seqlens_q: int32 `[N + 1]` on the device, cumulative query lengths from 0; None = not packed.
        cu_seqlens_k: Likewise for the keys; None = the queries'.
        max_seqlen_q: Longest query sequence, in tokens; required with `cu_seqlens_q`.
        max_seqlen_k: Longest key sequence; None = the queries'.
    """

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    def __post_init__(self) -> None:
        if self.cu_seqlens_q is None:
            if self.cu_seqlens_k is not None or self.max_seqlen_q is not None or self.max_seqlen_k is not None:
                raise UnsupportedRequestError("packed sequences need cu_seqlens_q; only others of the four were given")
            return
        if self.max_seqlen_q is None:
            raise UnsupportedRequestError(
                "cu_seqlens_q needs max_seqlen_q, the longest sequence in tokens: reading it from the device would wait"
            )
        if self.cu_seqlens_k is None:
            self.cu_seqlens_k, self.max_seqlen_k = self.cu_seqlens_q, self.max_seqlen_q
        if self.max_seqlen_k is None:
            raise UnsupportedRequestError("cu_seqlens_k needs max_seqlen_k, the longest key sequence in tokens")
        for name, lengths in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
            if lengths.dtype != torch.int32 or lengths.dim() != 1 or lengths.numel() < 2:
                raise UnsupportedRequestError(
                    f"{name} must be int32 [sequences + 1], got {lengths.dtype} {list(lengths.shape)}"
                )
        if self.cu_seqlens_q.shape != self.cu_seqlens_k.shape:
            raise UnsupportedRequestError(
                f"cu_seqlens_q counts {self.cu_seqlens_q.numel() - 1} sequences, cu_seqlens_k {self.cu_seqlens_k.numel() - 1}"
            )


class FlashAttentionMetadataBuilder(AttentionMetadataBuilder[FlashAttentionMetadata]):
    """Builds metadata for packed sequences."""

    def __init__(self) -> None:
        """Nothing to keep."""

    def prepare(self) -> None:
        """Nothing to reset."""

    def build(self, *, current_timestep: int = 0, **kwargs: Any) -> FlashAttentionMetadata:
        """Return the metadata; the arguments are its fields.

        Raises:
            UnsupportedRequestError: An argument that is no field; names it.
        """
        unknown = sorted(set(kwargs) - {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"})
        if unknown:
            raise UnsupportedRequestError(f"FLASH_ATTN metadata have no field {', '.join(unknown)}; remove it")
        return FlashAttentionMetadata(current_timestep, **kwargs)


@dataclass(frozen=True)
class _Version:
    """One flash-attn: where its functions are and what it runs on."""

    number: int
    module: str
    archs: frozenset[int]
    install: str
    # the public function's keyword for the log-sum-exp
    lse_argument: str

    def missing(self, arch: int | None, head_size: int) -> str:
        """Return why this version cannot serve, or an empty string."""
        try:
            found = importlib.util.find_spec(self.module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"flash-attn {self.number} is not installed ({self.install})"
        if arch not in self.archs:
            device = "no CUDA device" if arch is None else f"sm_{arch}"
            return (
                f"flash-attn {self.number} runs on {', '.join(f'sm_{a}' for a in sorted(self.archs))}, not on {device}"
            )
        if self.number == 4 and arch in (100, 103) and not (head_size <= 128 or head_size == 256):
            return f"flash-attn 4 on sm_{arch} takes head sizes up to 128, and 256, not {head_size}"
        return ""


_VERSIONS = (
    _Version(4, "flash_attn.cute", frozenset({90, 100, 103}), "pip install 'attnmux[flash]'", "return_lse"),
    _Version(3, "flash_attn_interface", frozenset({90}), "built from flash-attention's hopper folder", "return_attn_probs"),
    _Version(
        2, "flash_attn.flash_attn_interface", frozenset({80, 86, 87, 89, 90, 100, 103, 120}),
        "pip install 'attnmux[flash2]'", "return_attn_probs",
    ),
)  # fmt: skip


def _device_arch(device: str = "cuda") -> int | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(torch.device(device))
    return major * 10 + minor


def _choose(arch: int | None, head_size: int) -> tuple[_Version | None, list[str]]:
    """Return the newest version that fits, and why each newer one does not."""
    passed: list[str] = []
    for version in _VERSIONS:
        reason = version.missing(arch, head_size)
        if not reason:
            return version, passed
        passed.append(reason)
    return None, passed


class FlashAttentionImpl(AttentionImpl[FlashAttentionMetadata]):
    """Exact attention by flash-attn; float16 and bfloat16 on CUDA.

    The log-sum-exp carries no gradient. Backward is repeatable bit for bit under
    `torch.use_deterministic_algorithms(True)`, read when the layer is built.
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
        if head_size % 8 or not 8 <= head_size <= 256:
            raise UnsupportedRequestError(f"FLASH_ATTN takes head sizes 8 to 256 in steps of 8, got {head_size}")
        version, reasons = _choose(_device_arch(), head_size)
        if version is None:
            raise BackendUnavailableError(f"FLASH_ATTN cannot run here: {'; '.join(reasons)}")
        self._version = version
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        if version.number != 4:
            module = importlib.import_module(version.module)
            self._attend, self._attend_packed = module.flash_attn_func, module.flash_attn_varlen_func

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | None = None,
        *,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the output `[B, S_q, H, D]`, with `return_lse=True` also the LSE `[B, H, S_q]`.

        Args:
            query: `[B, S_q, H, D]`, or `[1, total, H, D]` for packed sequences.
            key: `[B, S_k, H_kv, D]`, likewise.
            value: `[B, S_k, H_kv, D]`, likewise.
            attn_metadata: Lengths of packed sequences, or None.
            return_lse: Whether to return the log-sum-exp: float32, natural logarithm; -inf for a query with nothing to
                attend.

        Raises:
            UnsupportedRequestError: Another dtype, or packed sequences with a batch size other than 1.
        """
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise UnsupportedRequestError(
                f"FLASH_ATTN computes float16 and bfloat16, got dtype {query.dtype}; cast q, k and v, or use TORCH_SDPA"
            )
        packed = attn_metadata is not None and attn_metadata.cu_seqlens_q is not None
        if packed and query.shape[0] != 1:
            raise UnsupportedRequestError(
                f"packed sequences come as one batch entry [1, total, H, D]; q has batch size {query.shape[0]}"
            )
        if packed and query.device != attn_metadata.cu_seqlens_q.device:  # type: ignore[union-attr]
            raise UnsupportedRequestError(
                f"cu_seqlens_q is on {attn_metadata.cu_seqlens_q.device}, q on {query.device}; move it there"  # type: ignore[union-attr]
            )
        lengths = attn_metadata if packed else None
        output, lse = self._run(query, key, value, lengths)
        if not return_lse:
            return output
        lse = lse.detach()
        if self.causal and not packed and query.shape[1] > key.shape[1]:
            # the first queries see no key; flash-attn writes +inf there
            rows = torch.arange(query.shape[1], device=query.device)
            lse = lse.masked_fill(rows < query.shape[1] - key.shape[1], float("-inf"))
        return output, lse

    def _run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: FlashAttentionMetadata | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = with_positive_scale(q, self.softmax_scale)
        if self._version.number == 4:
            output, lse = torch.ops.attnmux.flash_attn_4(
                q if lengths is None else q[0],
                k if lengths is None else k[0],
                v if lengths is None else v[0],
                scale,
                self.causal,
                self._deterministic,
                *((None, None, None, None) if lengths is None else _bounds(lengths)),
            )
        else:
            options: dict[str, Any] = {
                "softmax_scale": scale,
                "causal": self.causal,
                "deterministic": self._deterministic,
                self._version.lse_argument: True,
            }
            if lengths is None:
                output, lse = self._attend(q, k, v, **options)[:2]
            else:
                output, lse = self._attend_packed(q[0], k[0], v[0], *_bounds(lengths), **options)[:2]
        if lengths is not None:
            output, lse = output[None], lse[None]
        return output, lse


def _bounds(lengths: FlashAttentionMetadata) -> tuple[Any, Any, Any, Any]:
    return lengths.cu_seqlens_q, lengths.cu_seqlens_k, lengths.max_seqlen_q, lengths.max_seqlen_k


# Version 4 compiles a kernel on its first call with new arguments, and aborts the process when two threads do so at once:
# every call of it is made under this lock, also by plugins.
FLASH_ATTN_4_LOCK = threading.Lock()


@torch.library.custom_op("attnmux::flash_attn_4", mutates_args=())
def _flash_attn_4(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.cute import interface

    with FLASH_ATTN_4_LOCK:
        output, lse = interface._flash_attn_fwd(
            q.detach(),
            k.detach(),
            v.detach(),
            softmax_scale=softmax_scale,
            causal=causal,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            return_lse=True,
        )[:2]
    return output.contiguous(), lse


@_flash_attn_4.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool, deterministic: bool,
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    # packed: q [total, H, D], LSE [H, total]; else q [B, S, H, D], LSE [B, H, S]
    rows = q.shape[:-1]
    lse_shape = (*rows[:-2], rows[-1], rows[-2])
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op("attnmux::flash_attn_4_backward", mutates_args=())
def _flash_attn_4_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flash_attn.cute import interface

    with FLASH_ATTN_4_LOCK:
        grads = interface._flash_attn_bwd(
            q,
            k,
            v,
            output,
            grad.contiguous(),
            lse,
            softmax_scale,
            causal,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            deterministic=deterministic,
        )
    # contiguous whatever the strides of q, k, v, as the fake says; no copy where they are
    grad_q, grad_k, grad_v = (x.contiguous() for x in grads[:3])
    return grad_q, grad_k, grad_v


@_flash_attn_4_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, softmax_scale, causal, deterministic, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.options = (softmax_scale, causal, deterministic)
    ctx.longest = (max_seqlen_q, max_seqlen_k)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, _grad_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    grads = torch.ops.attnmux.flash_attn_4_backward(
        grad, *tensors, *ctx.options, cu_seqlens_q, cu_seqlens_k, *ctx.longest
    )
    return (*grads, *(None,) * 7)


_flash_attn_4.register_autograd(_backward, setup_context=_save_for_backward)


class FlashAttentionBackend(AttentionBackend):
    """flash-attn 4, 3 or 2."""

    @staticmethod
    def get_name() -> str:
        """Return "FLASH_ATTN"."""
        return "FLASH_ATTN"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Return FlashAttentionImpl."""
        return FlashAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[FlashAttentionMetadata]:
        """Return FlashAttentionMetadata, which packed sequences need."""
        return FlashAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Return the builder for packed sequences."""
        return FlashAttentionMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return 8 to 256 in steps of 8."""
        return list(range(8, 257, 8))

    @staticmethod
    def check_request(request: AttentionRequest) -> list[Reason]:
        """Return why no installed version can serve the request; empty if one can."""
        version, reasons = _choose(_device_arch(request.device), request.head_size)
        return [Reason("engine", reason) for reason in reasons] if version is None else []

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return which version would run, and why no newer one."""
        version, passed = _choose(_device_arch(request.device), request.head_size)
        if version is None:
            return ""
        return "; ".join([f"flash-attn {version.number} ({version.module})", *passed])
