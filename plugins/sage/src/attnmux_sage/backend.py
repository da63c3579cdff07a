"""The classes of the backends SAGE_ATTN and SAGE_SLA_ATTN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from attnmux.backend import AttentionBackend, AttentionImpl, AttentionMetadata, DenseMetadataBuilder
from attnmux.errors import UnsupportedRequestError
from attnmux_sage.branch import QuantisedBranch
from attnmux_sage.kernels.configs import AUTOMATIC_ORDER
from attnmux_sage.ops import ENGINES, PV_TYPES, refuse_gradients, sage_attention
from attnmux_sage.prepare import HEAD_SIZES, KEY_BLOCK, QUERY_TILE
from attnmux_sla.backend import SLAAttentionImpl, SLAAttentionMetadata, SLAAttentionMetadataBuilder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from attnmux.spec import AttentionRequest
    from attnmux_sage.conformance import SageAttentionConformance, SageSLAAttentionConformance
    from attnmux_sla.ops import SparseBranch

__all__ = ["SageAttentionBackend", "SageAttentionImpl", "SageSLAAttentionBackend", "SageSLAAttentionImpl"]

_SLA_HEAD_SIZES = range(16, 129, 16)


class SageAttentionImpl(AttentionImpl[AttentionMetadata]):
    """Dense attention of one layer in 8 bits, for inference.

    Args:
        num_heads: Query heads, >= 1.
        head_size: Channels of one head: 16 to 128 in steps of 8.
        softmax_scale: Factor on the scores; None = `head_size ** -0.5`.
        causal: Whether a query sees only keys up to its own position, the last query aligned with the last key.
        num_kv_heads: Key and value heads; None = `num_heads`.
        prefix: Name of the layer in its model, for messages.
        pv: "fp8" or "bf16": the product of weights and values in e4m3 or in the dtype of v; None = "fp8" where the card has it.
        engine: "reference", "triton", "hopper" or "official"; None takes the fastest of the first three that serves a call.
        **extra_impl_args: None; each is refused by name.

    Raises:
        UnsupportedRequestError: The head size, `pv` or engine is not supported, or an argument is unknown.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        *,
        pv: str | None = None,
        engine: str | None = None,
        **extra_impl_args: Any,
    ) -> None:
        super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra_impl_args)
        if head_size not in HEAD_SIZES:
            raise UnsupportedRequestError(
                f"SAGE_ATTN takes head sizes {HEAD_SIZES[0]} to {HEAD_SIZES[-1]} in steps of {HEAD_SIZES.step}, got "
                f"head_size={head_size}; pad the head"
            )
        _check_choices("SAGE_ATTN", pv, engine)
        self.pv = pv
        self.engine = engine

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
        *,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the output `[B, S_q, H, D]`, with `return_lse=True` also the LSE `[B, H, S_q]`.

        Args:
            query: `[B, S_q, H, D]`, D contiguous, otherwise any strides; not modified.
            key: `[B, S_k, H_kv, D]`, likewise.
            value: `[B, S_k, H_kv, D]`, likewise.
            attn_metadata: Not read.
            return_lse: Whether to return the log-sum-exp.

        Raises:
            UnsupportedRequestError: See `sage_attention`.
        """
        if query.shape[-1] != self.head_size:
            raise UnsupportedRequestError(
                f"query has head_dim={query.shape[-1]}, but this layer was built with head_size={self.head_size}"
            )
        return sage_attention(
            query,
            key,
            value,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            pv=self.pv,
            return_lse=return_lse,
            engine=self.engine,
        )


def _check_choices(backend: str, pv: str | None, engine: str | None) -> None:
    for name, value, known in (("pv", pv, PV_TYPES), ("engine", engine, ENGINES)):
        if value is not None and value not in known:
            raise UnsupportedRequestError(
                f"{name}={value!r} is not known to {backend}; expected None or one of {', '.join(known)}"
            )


class SageAttentionBackend(AttentionBackend):
    """Names the classes of SAGE_ATTN."""

    @staticmethod
    def get_name() -> str:
        """Return the backend's name."""
        return "SAGE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SageAttentionImpl]:
        """Return the class of one layer's attention."""
        return SageAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """Return the base class: nothing is needed."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[DenseMetadataBuilder]:
        """Return the class that builds the metadata."""
        return DenseMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return 16 to 128 in steps of 8."""
        return list(HEAD_SIZES)

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return in which order engines are tried; which one serves depends on the card and the tensors."""
        return _describe_engine(request)

    @staticmethod
    def get_conformance_cls() -> type[SageAttentionConformance]:
        """Return what `attnmux check SAGE_ATTN` runs; needs pytest."""
        from attnmux_sage.conformance import SageAttentionConformance

        return SageAttentionConformance


def _describe_engine(request: AttentionRequest) -> str:
    if request.device_type == "cpu":
        return "reference, which emulates the kernels' arithmetic in plain PyTorch"
    if request.dtype == "float32":
        return "reference, plain PyTorch: the kernels take bfloat16 and float16"
    return f"the first that serves the call: {', '.join(AUTOMATIC_ORDER)}"


class SageSLAAttentionImpl(SLAAttentionImpl):
    """Sparse-Linear Attention of one layer with its sparse branch in 8 bits, for inference.

    Everything but the sparse branch is SLA_ATTN's: the choice of blocks, the linear branch, `proj_l`, metadata, schedules. The
    state dict is the same, so that checkpoints trained with SLA_ATTN load. Parameters do not require gradients.

    Args:
        num_heads: Query heads, >= 1.
        head_size: Channels of one head: 16 to 128 in steps of 16.
        causal: Must be False.
        softmax_scale: Factor on the scores of the sparse branch; None = `head_size ** -0.5`.
        num_kv_heads: Key and value heads; None = `num_heads`.
        prefix: Name of the layer in its model; `blocks.<i>` in it gives the layer's index.
        topk_ratio: Fraction of key blocks kept per query block, in (0, 1], where the metadata name none.
        feature_map: "softmax", "elu" or "relu".
        BLKQ: Tokens of a query block: 128, on every card, so that a checkpoint keeps its meaning.
        BLKK: Tokens of a key block: 64.
        use_bf16: Half inputs on a GPU are computed in bfloat16 if True, in float16 if False, whichever they come in.
        pv: "fp8" or "bf16": the product of weights and values in e4m3 or in the dtype of v; None = "fp8" where the card has it.
        linear_keys: "all", "complement" or "marginal"; see `attnmux_sla.sparse_linear_attention`.
        negligible_ratio: Fraction of key blocks that "marginal" leaves out, in [0, 1].
        router: "mean", "learned" or a module, as in SLA_ATTN.
        combine: "project", "alpha" or a module, as in SLA_ATTN.
        layer_idx: The layer's index, from 0, for top-k schedules; None = as the prefix says.
        engine: Of the sparse branch: "reference", "triton", "hopper" or "official"; "reference" holds for everything. None
            takes the fastest.
        **extra_impl_args: None; each is refused by name.

    Raises:
        UnsupportedRequestError: `causal` is set, or an argument is unknown or out of its range.
    """

    backend_name: ClassVar[str] = "SAGE_SLA_ATTN"

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool = False,
        softmax_scale: float | None = None,
        num_kv_heads: int | None = None,
        prefix: str = "",
        topk_ratio: float = 0.5,
        feature_map: str = "softmax",
        BLKQ: int = QUERY_TILE,
        BLKK: int = KEY_BLOCK,
        use_bf16: bool = True,
        *,
        pv: str | None = None,
        linear_keys: str = "all",
        negligible_ratio: float = 0.1,
        router: str | nn.Module = "mean",
        combine: str | nn.Module = "project",
        layer_idx: int | None = None,
        engine: str | None = None,
        **extra_impl_args: Any,
    ) -> None:
        _check_choices(self.backend_name, pv, engine)
        if head_size not in _SLA_HEAD_SIZES:
            raise UnsupportedRequestError(
                f"{self.backend_name} takes head sizes 16 to 128 in steps of 16, got head_size={head_size}; pad the head, or "
                "use SLA_ATTN"
            )
        if (BLKQ, BLKK) != (QUERY_TILE, KEY_BLOCK):
            raise UnsupportedRequestError(
                f"{self.backend_name} takes BLKQ={QUERY_TILE} and BLKK={KEY_BLOCK}, got BLKQ={BLKQ!r} and BLKK={BLKK!r}; "
                "other blocks are SLA_ATTN's"
            )
        super().__init__(
            num_heads, head_size, causal, softmax_scale, num_kv_heads, prefix, topk_ratio, feature_map, BLKQ, BLKK, use_bf16,
            linear_keys=linear_keys, negligible_ratio=negligible_ratio, router=router, combine=combine, layer_idx=layer_idx,
            engine="reference" if engine == "reference" else None, **extra_impl_args,
        )  # fmt: skip
        self.pv = pv
        self.sparse_engine = engine
        self.requires_grad_(False)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: SLAAttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Return the attention output `[B, S_q, H, D]` in the dtype of `query`.

        Args:
            query: `[B, S_q, H, D]`, float16, bfloat16 or float32, D contiguous, otherwise any strides; not modified.
            key: `[B, S_k, H_kv, D]`, likewise.
            value: `[B, S_k, H_kv, D]`, likewise.
            attn_metadata: The step's top-k; None = the layer's own.

        Raises:
            UnsupportedRequestError: Something requires a gradient; or see `sage_attention` and
                `attnmux_sla.sparse_linear_attention`.
        """
        refuse_gradients(self.backend_name, query, key, value, *self.parameters())
        return super().forward(query, key, value, attn_metadata)

    def _sparse_branch(self) -> SparseBranch:
        return QuantisedBranch(self.pv, self.sparse_engine)


class SageSLAAttentionBackend(AttentionBackend):
    """Names the classes of SAGE_SLA_ATTN."""

    @staticmethod
    def get_name() -> str:
        """Return the backend's name."""
        return "SAGE_SLA_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SageSLAAttentionImpl]:
        """Return the class of one layer's attention."""
        return SageSLAAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[SLAAttentionMetadata]:
        """Return the class of the metadata, which is SLA_ATTN's."""
        return SLAAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[SLAAttentionMetadataBuilder]:
        """Return the class that builds the metadata, which is SLA_ATTN's."""
        return SLAAttentionMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return 16 to 128 in steps of 16."""
        return list(_SLA_HEAD_SIZES)

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return in which order engines of the sparse branch are tried."""
        return _describe_engine(request)

    @staticmethod
    def get_conformance_cls() -> type[SageSLAAttentionConformance]:
        """Return what `attnmux check SAGE_SLA_ATTN` runs; needs pytest."""
        from attnmux_sage.conformance import SageSLAAttentionConformance

        return SageSLAAttentionConformance
