"""What the conformance suite of attnmux needs to know of this backend: its top-k, its oracle, its dense limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attnmux.testing import BackendConformance, DenseLimit
from attnmux_sla.backend import SLAAttentionImpl, SLAAttentionMetadata
from attnmux_sla.ops import sparse_linear_attention

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from attnmux.backend import AttentionMetadata
    from attnmux.testing.conformance.cases import Case

__all__ = ["SLAAttentionConformance"]

_RATIO = 0.5


class SLAAttentionConformance(BackendConformance):
    """Holds SLA_ATTN to the reference in float64, and to dense attention where every block is kept and nothing is added."""

    backend = "SLA_ATTN"
    # Several blocks on both sides, the last ones short.
    typical_length = 330
    deviations: ClassVar[Mapping[str, str]] = {
        "test_layer_gives_the_result_of_the_impl[cuda-float16]": "use_bf16=True, the default, computes float16 in bfloat16",
    }

    def make_impl(self, case: Case, *, impl_args: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
        """Return an impl that computes in the half dtype of the case."""
        arguments.setdefault("use_bf16", case.q.dtype != torch.float16)
        return super().make_impl(case, impl_args=impl_args, **arguments)

    def make_metadata(
        self, seq_len_q: int, seq_len_k: int, *, batch: int, device: torch.device
    ) -> SLAAttentionMetadata:
        """Return a step at which half of the key blocks are kept."""
        return SLAAttentionMetadata(0, _RATIO)

    def oracle(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return the reference in the float64 of its inputs and of the layer's parameters."""
        assert isinstance(metadata, SLAAttentionMetadata)
        assert metadata.topk_ratio is not None
        impl = options["impl"]
        assert isinstance(impl, SLAAttentionImpl)
        assert impl.proj_l is not None
        return sparse_linear_attention(
            q,
            k,
            v,
            impl.proj_l.weight,
            impl.proj_l.bias,
            topk_ratio=metadata.topk_ratio,
            block_q=impl.block_q,
            block_k=impl.block_k,
            softmax_scale=options["softmax_scale"],
            engine="reference",
        )

    def dense_limit(self, q: torch.Tensor, k: torch.Tensor) -> DenseLimit:
        """Return the call that keeps every block, by a layer whose projection is still zero."""
        return DenseLimit(metadata=SLAAttentionMetadata(0, 1.0))

    def custom_ops(self, device: torch.device) -> Iterable[tuple[Any, tuple[Any, ...]]]:
        """Return the operators on small tensors."""
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        q, k, v = (torch.randn(1, 150, 2, 32, device=device, dtype=dtype) for _ in range(3))
        ops = torch.ops.attnmux_sla
        yield ops.pool.default, (q, 128, "")
        yield ops.summarize_keys.default, (k, v, 64, "softmax", True, "")
        pooled_q = ops.pool(q, 128, "")
        pooled_k, state, mass, _ = ops.summarize_keys(k, v, 64, "softmax", False, "")
        blocks = torch.ops.attnmux_blocksparse.select(pooled_q, pooled_k, 2, 0, 1.0)
        counts = torch.full(blocks.shape[:3], 2, dtype=torch.int32, device=device)
        lists = torch.ops.attnmux_blocksparse.transpose(blocks, counts, 3)
        weight, bias = torch.randn(32, 32, device=device), torch.randn(32, device=device)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, weight, bias)]
        yield (
            ops.attend.default,
            (*leaves, state, mass, blocks, counts, *lists, 128, 64, 0.2, "softmax", "", ""),
        )
