"""What the conformance suite of attnmux needs to know of these backends: that the oracle rounds to 8 bits too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attnmux.testing import BackendConformance
from attnmux_sage.backend import SageSLAAttentionImpl
from attnmux_sage.kernels import default_pv
from attnmux_sage.ops import emulate
from attnmux_sla.backend import SLAAttentionMetadata
from attnmux_sla.conformance import SLAAttentionConformance
from attnmux_sla.ops import sparse_linear_attention

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from attnmux.backend import AttentionMetadata
    from attnmux_blocksparse.index import BlockIndex

__all__ = ["SageAttentionConformance", "SageSLAAttentionConformance"]

NO_LIMIT = "eight bits are eight bits: no arguments make it dense attention; tests hold its accuracy to figures instead"


class SageAttentionConformance(BackendConformance):
    """Holds SAGE_ATTN to the emulation of its arithmetic, on the float64 copies of the inputs."""

    backend = "SAGE_ATTN"
    # Several blocks on both sides, the last ones short.
    typical_length = 150
    deviations: ClassVar[Mapping[str, str]] = {"test_dense_limit_equals_dense": NO_LIMIT}

    def oracle(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return the emulation, which computes in float32 and is exact where the kernels are."""
        scale, causal, pv = options["softmax_scale"], options["causal"], options["impl"].pv or default_pv(q)
        return emulate(q, k, v, softmax_scale=scale, causal=causal, pv=pv)[0]

    def oracle_lse(
        self, q: torch.Tensor, k: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return the emulation's log-sum-exp."""
        return emulate(q, k, k, softmax_scale=options["softmax_scale"], causal=options["causal"])[1].double()

    def custom_ops(self, device: torch.device) -> Iterable[tuple[Any, tuple[Any, ...]]]:
        """Return the operator on small tensors, over all keys and over lists."""
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        q, k, v = (torch.randn(1, 150, 2, 32, device=device, dtype=dtype) for _ in range(3))
        operator = torch.ops.attnmux_sage.forward.default
        yield operator, (q, k, v, None, None, True, 0.2, False, "", True, "")
        blocks = torch.tensor([0, 2], dtype=torch.int32, device=device).expand(1, 2, 2, 2).contiguous()
        counts = torch.tensor([2, 1], dtype=torch.int32, device=device).expand(1, 2, 2).contiguous()
        yield operator, (q, k, v, blocks, counts, False, 0.2, False, "bf16", False, "")


class SageSLAAttentionConformance(SLAAttentionConformance):
    """Holds SAGE_SLA_ATTN to SLA's reference in float64 around the emulation of the quantised branch."""

    backend = "SAGE_SLA_ATTN"
    deviations: ClassVar[Mapping[str, str]] = {
        **SLAAttentionConformance.deviations,
        "test_dense_limit_equals_dense": NO_LIMIT,
    }

    def oracle(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return the reference in float64, its sparse branch in 8 bits."""
        assert isinstance(metadata, SLAAttentionMetadata)
        assert metadata.topk_ratio is not None
        impl = options["impl"]
        assert isinstance(impl, SageSLAAttentionImpl)
        assert impl.proj_l is not None
        pv = impl.pv or default_pv(q)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: BlockIndex, scale: float) -> torch.Tensor:
            return emulate(
                q,
                k,
                v,
                softmax_scale=scale,
                blocks=index.blocks,
                counts=index.counts,
                pv=pv,
            )[0]

        return sparse_linear_attention(
            q,
            k,
            v,
            impl.proj_l.weight,
            impl.proj_l.bias,
            topk_ratio=metadata.topk_ratio,
            softmax_scale=options["softmax_scale"],
            sparse_attention=attend,
            engine="reference",
        )

    def custom_ops(self, device: torch.device) -> Iterable[tuple[Any, tuple[Any, ...]]]:
        """Return the operator that joins the branches, on small tensors; the others are tested with their backends."""
        q, sparse = (torch.randn(1, 150, 2, 32, device=device, dtype=torch.float16) for _ in range(2))
        state, mass = torch.rand(1, 2, 32, 32, device=device), torch.rand(1, 2, 32, device=device)
        weight, bias = torch.randn(32, 32, device=device), torch.randn(32, device=device)
        yield torch.ops.attnmux_sla.add_linear_branch.default, (q, sparse, state, mass, weight, bias, "softmax", "")
