"""What the conformance suite of attnmux needs to know of these backends: that the oracle rounds to 8 bits too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attnmux.testing import BackendConformance
from attnmux.testing.tolerance import visible_keys
from attnmux_sage.backend import SageSLAAttentionImpl
from attnmux_sage.branch import QuantisedBranch
from attnmux_sage.kernels import HALF_TYPES, default_pv, keys_per_step
from attnmux_sage.ops import emulate
from attnmux_sage.reference import attend
from attnmux_sla.backend import SLAAttentionMetadata
from attnmux_sla.conformance import SLAAttentionConformance
from attnmux_sla.ops import sparse_linear_attention

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from attnmux.backend import AttentionMetadata
    from attnmux.testing.conformance.cases import Case
    from attnmux_blocksparse.index import BlockIndex

__all__ = ["SageAttentionConformance", "SageSLAAttentionConformance"]

NO_LIMIT = "eight bits are eight bits: no arguments make it dense attention; tests hold its accuracy to figures instead"


def _half_type(*tensors: torch.Tensor) -> torch.dtype | None:
    """Return the half type that float64 copies on a GPU were made from; None for others, which the reference engine serves."""
    if tensors[0].device.type == "cuda":
        for dtype in HALF_TYPES:
            if all(bool((x.to(dtype).double() == x).all()) for x in tensors):
                return dtype
    return None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pv: str | None, *, softmax_scale: float, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the emulation and its LSE; where kernels run, over the integers that they make of q and k.

    Those differ from PyTorch's by one here and there, where a sum in another order ends on the other side of a half; with large
    scores one is much. That they are right otherwise is tested by itself.
    """
    pv, dtype = pv or default_pv(q), _half_type(q, k, v)
    if dtype is None:
        return emulate(q, k, v, softmax_scale=softmax_scale, pv=pv, **options)
    from attnmux_sage.kernels.quantise import launch_quantise

    tensors = (x.to(dtype) for x in (q, k, v))
    quantised = launch_quantise(*tensors, softmax_scale=softmax_scale, fp8_values=pv == "fp8")
    step = keys_per_step(q.device, options.get("causal", False))
    return attend(quantised, v, len_q=q.shape[1], keys_per_step=step, **options)


class _EmulatedBranch(QuantisedBranch):
    """The sparse branch of the oracle, on float64 copies; where kernels run, over the integers that they make."""

    def pools_queries(self, feature_map: str) -> bool:
        return False

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: BlockIndex, softmax_scale: float
    ) -> torch.Tensor:
        pv, dtype, lists = self.pv or default_pv(q), _half_type(q, k, v), (index.blocks, index.counts)
        if dtype is None:
            return emulate(q, k, v, softmax_scale=softmax_scale, pv=pv, blocks=lists[0], counts=lists[1])[0]
        from attnmux_sage.kernels.launch import quantise_pooling

        q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
        pooled_k, state, _, range_v = torch.ops.attnmux_sla.summarize_keys(k_, v_, index.block_k, "softmax", True, "")
        quantised, _ = quantise_pooling(q_, k_, v_, pooled_k, state, range_v, softmax_scale=softmax_scale, pv=pv)
        step = keys_per_step(q.device, False)
        return attend(quantised, v, len_q=q.shape[1], keys_per_step=step, blocks=lists[0], counts=lists[1])[0]


def _rounding_step(case: Case, pv: str | None) -> float:
    if _half_type(case.q.double()) is None or (pv or default_pv(case.q)) != "fp8":
        return 0.0
    group = case.q.shape[2] // case.k.shape[2]
    q, k = case.q.float().transpose(1, 2), case.k.float().transpose(1, 2).repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * case.options["softmax_scale"]
    visible = visible_keys(q.shape[2], k.shape[2], causal=case.causal, attn_mask=None, device=q.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    # neighbours in e4m3 are an eighth apart at most
    return float(weights.amax() * case.v.abs().amax()) / 8


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
        return _attend(q, k, v, options["impl"].pv, softmax_scale=options["softmax_scale"], causal=options["causal"])[0]

    def oracle_lse(
        self, q: torch.Tensor, k: torch.Tensor, metadata: AttentionMetadata | None, **options: Any
    ) -> torch.Tensor:
        """Return the emulation's log-sum-exp."""
        return _attend(q, k, k, None, softmax_scale=options["softmax_scale"], causal=options["causal"])[1].double()

    def rounding_step(self, case: Case) -> float:
        """Return what a weight that rounds to the next e4m3 moves; 0 where the oracle has the bits of the engine."""
        return _rounding_step(case, self.impl_args.get("pv"))

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

        return sparse_linear_attention(
            q,
            k,
            v,
            impl.proj_l.weight,
            impl.proj_l.bias,
            topk_ratio=metadata.topk_ratio,
            softmax_scale=options["softmax_scale"],
            sparse_branch=_EmulatedBranch(impl.pv, None),
            engine="reference",
        )

    def rounding_step(self, case: Case) -> float:
        """Return what a weight that rounds to the next e4m3 moves; 0 where the oracle has the bits of the engine."""
        return _rounding_step(case, self.impl_args.get("pv"))

    def custom_ops(self, device: torch.device) -> Iterable[tuple[Any, tuple[Any, ...]]]:
        """Return the operators of the quantised branch and the one that joins the branches, on small tensors."""
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        q, k, v, sparse = (torch.randn(1, 150, 2, 32, device=device, dtype=dtype) for _ in range(4))
        pooled_k, state, _, range_v = torch.ops.attnmux_sla.summarize_keys(k, v, 64, "softmax", True, "")
        for pv in ("fp8", "bf16"):
            summary = (q, k, v, pooled_k, state, range_v, 0.2, pv, "")
            yield torch.ops.attnmux_sage.quantise_pooling.default, summary
            _, *tensors = torch.ops.attnmux_sage.quantise_pooling(*summary)
            blocks = torch.tensor([0, 2], dtype=torch.int32, device=device).expand(1, 2, 2, 2).contiguous()
            counts = torch.tensor([2, 1], dtype=torch.int32, device=device).expand(1, 2, 2).contiguous()
            yield torch.ops.attnmux_sage.attend_quantised.default, (*tensors, v, blocks, counts, False, 150, "")
        state, mass = torch.rand(1, 2, 32, 32, device=device), torch.rand(1, 2, 32, device=device)
        weight, bias = torch.randn(32, 32, device=device), torch.randn(32, device=device)
        yield torch.ops.attnmux_sla.add_linear_branch.default, (q, sparse, state, mass, weight, bias, "softmax", "")
