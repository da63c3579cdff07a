"""The classes of the backend SLA_ATTN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from attnmux.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    LayerPlace,
    layer_index,
)
from attnmux.errors import UnsupportedRequestError
from attnmux_sla.kernels import ENGINES, HALF_TYPES
from attnmux_sla.ops import SparseBranch, sparse_linear_attention
from attnmux_sla.prepare import FEATURE_MAPS, LINEAR_KEYS, TopkRule, check_topk_ratio
from attnmux_sla.sla2 import AlphaMix, LearnedRouter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnmux.spec import AttentionRequest
    from attnmux_sla.conformance import SLAAttentionConformance

__all__ = ["SLAAttentionBackend", "SLAAttentionImpl", "SLAAttentionMetadata", "SLAAttentionMetadataBuilder"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class SLAAttentionMetadata(AttentionMetadata):
    """The step and how many key blocks to keep.

    Attributes:
        current_timestep: Index of the denoising step, from 0; attention does not read it.
        topk_ratio: Fraction of key blocks kept per query block, in (0, 1]; None = each layer's own.
        rules: Fractions for some layers during this step; the first rule that covers a layer wins over `topk_ratio`.
        protected_tokens: The blocks of the first tokens of k that are always kept (a text prompt's); they count as kept.

    Raises:
        UnsupportedRequestError: A number is out of its range.
    """

    topk_ratio: float | None = None
    rules: tuple[TopkRule, ...] = ()
    protected_tokens: int = 0

    def __post_init__(self) -> None:
        if self.topk_ratio is not None:
            check_topk_ratio(self.topk_ratio)
        if self.protected_tokens < 0:
            raise UnsupportedRequestError(f"protected_tokens must be >= 0, got {self.protected_tokens!r}")


class SLAAttentionMetadataBuilder(AttentionMetadataBuilder[SLAAttentionMetadata]):
    """Builds the metadata of a step, from a top-k schedule where there is one."""

    def __init__(self) -> None:
        """Nothing to keep."""

    def prepare(self) -> None:
        """Nothing to reset."""

    def build(
        self,
        current_timestep: int = 0,
        topk_ratio: float | None = None,
        *,
        schedule: Sequence[TopkRule] = (),
        protected_tokens: int = 0,
        **unknown: Any,
    ) -> SLAAttentionMetadata:
        """Return the metadata for one forward pass.

        Args:
            current_timestep: Index of the denoising step, from 0.
            topk_ratio: Fraction of key blocks kept, in (0, 1], by layers that no rule covers; None = each layer's own.
            schedule: Rules for layers and steps; of those that cover a layer at this step the first holds.
            protected_tokens: First tokens of k whose blocks are always kept.
            **unknown: None; each is refused by name.

        Raises:
            UnsupportedRequestError: A number is out of its range, or an argument is unknown.
        """
        if unknown:
            raise UnsupportedRequestError(
                f"{type(self).__name__}.build does not know the argument {', '.join(sorted(unknown))}; it takes "
                "current_timestep, topk_ratio, schedule and protected_tokens"
            )
        rules = tuple(rule for rule in schedule if rule.covers_step(current_timestep))
        return SLAAttentionMetadata(current_timestep, topk_ratio, rules, protected_tokens)


class SLAAttentionImpl(AttentionImpl[SLAAttentionMetadata], nn.Module):
    """Sparse-Linear Attention of one layer, with `proj_l`, the projection of the linear branch.

    `proj_l` is float32 and zero at first, so that an untrained layer is block-sparse attention. Checkpoints of the published
    code load unchanged (`proj_l.weight`, `proj_l.bias`). `model.to(torch.bfloat16)` rounds it like any parameter; products
    with it are float32 in any case, and autocast has no say in them. Under sequence parallelism by heads each rank's
    gradient of `proj_l` is that of its own heads: sum it over the ranks of one sequence, by the layer's convention.

    Args:
        num_heads: Query heads, >= 1.
        head_size: Channels of one head: 16 to 256 in steps of 16.
        causal: Must be False.
        softmax_scale: Factor on the scores of the sparse branch; None = `head_size ** -0.5`.
        num_kv_heads: Key and value heads; None = `num_heads`.
        prefix: Name of the layer in its model; `blocks.<i>` in it gives the layer's index.
        topk_ratio: Fraction of key blocks kept per query block, in (0, 1], where the metadata name none.
        feature_map: "softmax", "elu" or "relu".
        BLKQ: Tokens of a query block: 64, 128 or 256.
        BLKK: Tokens of a key block: 64, 128 or 256.
        use_bf16: Half inputs on a GPU are computed in bfloat16 if True, in float16 if False, whichever they come in;
            the output has the dtype of the input. On a CPU, and for float32 and float64, inputs keep their dtype.
        linear_keys: "all", "complement" or "marginal"; see `sparse_linear_attention`.
        negligible_ratio: Fraction of key blocks that "marginal" leaves out, in [0, 1].
        router: "mean" (pooled q and k), "learned" (`LearnedRouter`), or a module of that form.
        combine: "project" (`proj_l`), "alpha" (`AlphaMix`), or a module of that form; but for "project" there is no `proj_l`.
        layer_idx: The layer's index, from 0, for top-k schedules; None = as the prefix says.
        engine: "reference" or "triton"; None takes the fastest that serves a call.
        **extra_impl_args: None; each is refused by name.

    Raises:
        UnsupportedRequestError: `causal` is set, or an argument is unknown or out of its range.
    """

    backend_name: ClassVar[str] = "SLA_ATTN"

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool = False,
        softmax_scale: float | None = None,
        num_kv_heads: int | None = None,
        prefix: str = "",
        topk_ratio: float = 0.1,
        feature_map: str = "softmax",
        BLKQ: int = 128,
        BLKK: int = 64,
        use_bf16: bool = True,
        *,
        linear_keys: str = "all",
        negligible_ratio: float = 0.1,
        router: str | nn.Module = "mean",
        combine: str | nn.Module = "project",
        layer_idx: int | None = None,
        engine: str | None = None,
        **extra_impl_args: Any,
    ) -> None:
        nn.Module.__init__(self)
        AttentionImpl.__init__(
            self, num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **extra_impl_args
        )
        if causal:
            raise UnsupportedRequestError(
                f"{self.backend_name} cannot run causal=True: every token of a kept block is attended, and the linear "
                "branch sums over all keys; use TORCH_SDPA or FLASH_ATTN for a causal layer"
            )
        if head_size % 16 or not 16 <= head_size <= 256:
            raise UnsupportedRequestError(
                f"{self.backend_name} takes head sizes 16 to 256 in steps of 16, got head_size={head_size}; pad the head"
            )
        for name, value, known in (
            ("feature_map", feature_map, FEATURE_MAPS),
            ("BLKQ", BLKQ, (64, 128, 256)),
            ("BLKK", BLKK, (64, 128, 256)),
            ("linear_keys", linear_keys, LINEAR_KEYS),
            ("engine", engine, (None, *ENGINES)),
        ):
            if value not in known:
                raise UnsupportedRequestError(
                    f"{name}={value!r} is not known to {self.backend_name}; expected one of {', '.join(map(str, known))}"
                )
        if not 0 <= negligible_ratio <= 1:
            raise UnsupportedRequestError(f"negligible_ratio must be in [0, 1], got {negligible_ratio!r}")
        self.topk_ratio = check_topk_ratio(topk_ratio)
        self.feature_map = feature_map
        self.block_q = BLKQ
        self.block_k = BLKK
        self.half_dtype = torch.bfloat16 if use_bf16 else torch.float16
        self.linear_keys = linear_keys
        self.negligible_ratio = negligible_ratio
        self.layer_idx = layer_index(prefix, layer_idx)
        self._place = LayerPlace(self.layer_idx)
        self.engine = engine
        self.router = _part("router", router, {"mean": None, "learned": LearnedRouter}, head_size)
        self.combine = _part("combine", combine, {"project": None, "alpha": AlphaMix}, head_size)
        self.proj_l: nn.Linear | None = None
        if self.combine is None:
            self.proj_l = nn.Linear(head_size, head_size, dtype=torch.float32)
            nn.init.zeros_(self.proj_l.weight)
            nn.init.zeros_(self.proj_l.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: SLAAttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Return the attention output `[B, S_q, H, D]` in the dtype of `query`.

        Args:
            query: `[B, S_q, H, D]`, D contiguous, otherwise any strides; not modified.
            key: `[B, S_k, H_kv, D]`, likewise.
            value: `[B, S_k, H_kv, D]`, likewise.
            attn_metadata: The step's top-k; None = the layer's own.

        Raises:
            UnsupportedRequestError: See `sparse_linear_attention`.
        """
        topk_ratio, protected_tokens = self.topk_ratio, 0
        if attn_metadata is not None:
            if not isinstance(attn_metadata, SLAAttentionMetadata):
                raise UnsupportedRequestError(
                    f"{self.backend_name} needs SLAAttentionMetadata or None, got {type(attn_metadata).__name__}"
                )
            topk_ratio, protected_tokens = self._topk_ratio(attn_metadata), attn_metadata.protected_tokens
        if query.dtype not in _DTYPES:
            raise UnsupportedRequestError(f"query has dtype {query.dtype}; supported: {', '.join(map(str, _DTYPES))}")
        if query.shape[-1] != self.head_size:
            raise UnsupportedRequestError(
                f"query has head_dim={query.shape[-1]}, but this layer was built with head_size={self.head_size}"
            )
        dtype = query.dtype
        if dtype in HALF_TYPES and dtype != self.half_dtype and query.device.type != "cpu":
            query, key, value = (x.to(self.half_dtype) for x in (query, key, value))
        out = sparse_linear_attention(
            query,
            key,
            value,
            None if self.proj_l is None else self.proj_l.weight,
            None if self.proj_l is None else self.proj_l.bias,
            topk_ratio=topk_ratio,
            feature_map=self.feature_map,
            linear_keys=self.linear_keys,
            negligible_ratio=self.negligible_ratio,
            block_q=self.block_q,
            block_k=self.block_k,
            softmax_scale=self.softmax_scale,
            protected_tokens=protected_tokens,
            router=self.router,
            combine=self.combine,
            sparse_branch=self._sparse_branch(),
            engine=self.engine,
        )
        return out.to(dtype)

    def _sparse_branch(self) -> SparseBranch | None:
        """What computes the sparse branch, for `sparse_linear_attention`; a subclass may have its own."""
        return None

    def _topk_ratio(self, metadata: SLAAttentionMetadata) -> float:
        for rule in metadata.rules:
            if rule.covers_layer(self._place):
                return rule.topk_ratio
        return self.topk_ratio if metadata.topk_ratio is None else metadata.topk_ratio


def _part(name: str, given: str | nn.Module, known: dict[str, Any], head_size: int) -> nn.Module | None:
    """Return the module that a name or a module stands for; None for what needs none."""
    if isinstance(given, nn.Module):
        return given
    if given not in known:
        raise UnsupportedRequestError(
            f"{name}={given!r} is not known to SLA_ATTN; expected a module or one of {', '.join(known)}"
        )
    build = known[given]
    return None if build is None else build(head_size)


class SLAAttentionBackend(AttentionBackend):
    """Names the classes of SLA_ATTN."""

    @staticmethod
    def get_name() -> str:
        """Return the backend's name."""
        return "SLA_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SLAAttentionImpl]:
        """Return the class of one layer's attention."""
        return SLAAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[SLAAttentionMetadata]:
        """Return the class of the metadata."""
        return SLAAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[SLAAttentionMetadataBuilder]:
        """Return the class that builds the metadata."""
        return SLAAttentionMetadataBuilder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return 16 to 256 in steps of 16."""
        return list(range(16, 257, 16))

    @staticmethod
    def describe_engine(request: AttentionRequest) -> str:
        """Return what runs the request, as far as dtype, head size and device tell."""
        if request.device_type == "cpu":
            return "reference, plain PyTorch"
        if request.dtype not in ("bfloat16", "float16"):
            return "reference, plain PyTorch: the kernels take bfloat16 and float16"
        if request.head_size > 128:
            return "block-sparse kernels; the linear branch in plain PyTorch, whose kernels take head sizes up to 128"
        return "block-sparse kernels, the linear branch in triton"

    @staticmethod
    def get_conformance_cls() -> type[SLAAttentionConformance]:
        """Return what `attnmux check SLA_ATTN` runs; needs pytest."""
        from attnmux_sla.conformance import SLAAttentionConformance

        return SLAAttentionConformance
