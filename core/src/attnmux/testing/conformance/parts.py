"""Checks of attention over parts of the keys, which the strategies "ring" and "usp" put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from attnmux.backend import AttentionImpl
from attnmux.distributed.merge import merge_part
from attnmux.testing.conformance.harness import ConformanceHarness

if TYPE_CHECKING:
    from attnmux.testing.conformance.cases import Case

__all__ = ["PartChecks"]


class PartChecks(ConformanceHarness):
    """Parts of the keys, each by itself, make up the whole."""

    def _skip_unless_parts(self, impl_cls: type[Any], dtype: str) -> None:
        if not self.capabilities.sequence_parallel & {"ring", "usp"}:
            pytest.skip(f"{self.backend} declares neither 'ring' nor 'usp'")
        if dtype == "float64" and impl_cls.attend_part is AttentionImpl.attend_part:
            pytest.skip(f"{self.backend} has its log-sum-exp in float32 alone, which bounds what is merged by it")

    def _check(self, case: Case) -> None:
        impl = self.make_impl(case)
        if self.capabilities.backward:
            self.check_gradients(case, impl=impl, runner=_attend_by_parts)
        else:
            with torch.no_grad():
                self.check_output(case, impl=impl, result=_attend_by_parts(impl, case))

    @pytest.mark.parametrize("input_scale", [1.0, 16.0])
    def test_parts_merge_to_the_whole(self, device: str, any_dtype: str, input_scale: float) -> None:
        """`attend_part` on three parts of the keys, merged, is attention; `part_gradients` of the parts add up to its own.

        If this fails in the output: the log-sum-exp does not belong to the output (base 2, unscaled, a part's maximum). In
        gradients alone: a part's gradients are those of its own softmax, and not of the one over all keys, whose output and
        log-sum-exp are the arguments.
        """
        self._skip_unless_parts(self.backend_cls.get_impl_cls(), any_dtype)
        self._check(self.make_case(device, any_dtype, input_scale=input_scale))

    def test_parts_merge_under_every_option(self, device: str, dtype: str) -> None:
        """Parts merge with grouped queries, a factor on the scores of any sign, and non-contiguous inputs.

        If this fails: `part_gradients` uses the default scale, or adds the wrong heads up.
        """
        self._skip_unless_parts(self.backend_cls.get_impl_cls(), dtype)
        self._check(self.make_case(device, dtype, layout="packed"))
        if self.capabilities.gqa:
            self._check(self.make_case(device, dtype, num_kv_heads=self.num_heads // 2))
        if self.capabilities.softmax_scale:
            for softmax_scale in (0.0, -0.3):
                self._check(self.make_case(device, dtype, softmax_scale=softmax_scale))


def _attend_by_parts(impl: Any, case: Case) -> torch.Tensor:
    output: torch.Tensor = _ByParts.apply(case.q, case.k, case.v, impl, case.metadata)  # type: ignore[no-untyped-call]
    return output


def _parts(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return three parts of each along the tokens, one of them a single token."""
    length = tensors[0].shape[1]
    sizes = [1, (length - 1) // 3, length - 1 - (length - 1) // 3]
    return list(zip(*(torch.split(x, sizes, dim=1) for x in tensors), strict=True))


class _ByParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, impl: Any, metadata: Any) -> torch.Tensor:
        merged = None
        for key, value in _parts(k, v):
            merged = merge_part(merged, *impl.attend_part(q, key, value, metadata))
        assert merged is not None
        output = merged[0].to(q.dtype)
        ctx.save_for_backward(q, k, v, output, merged[1])
        ctx.impl, ctx.of_call = impl, metadata
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        parts = [ctx.impl.part_gradients(grad, q, key, value, output, lse, ctx.of_call) for key, value in _parts(k, v)]
        of_q = torch.stack([part[0].to(lse.dtype) for part in parts]).sum(0).to(q.dtype)
        of_k, of_v = (torch.cat([part[which] for part in parts], dim=1).to(k.dtype) for which in (1, 2))
        return of_q, of_k, of_v, None, None
