"""Checks of gradients against the float64 oracle's."""

from __future__ import annotations

import pytest

from attnmux.testing.conformance.cases import gradients, with_gradients
from attnmux.testing.conformance.harness import ConformanceHarness
from attnmux.testing.conformance.values import cross_lengths
from attnmux.testing.inputs import INPUT_SCALES

__all__ = ["GradientChecks"]


class GradientChecks(ConformanceHarness):
    """Backward computes the derivative of forward."""

    @pytest.mark.parametrize("input_scale", INPUT_SCALES)
    def test_gradients_equal_oracle(self, device: str, any_dtype: str, input_scale: float) -> None:
        """Gradients of q, k, v, of extra inputs and of parameters obey the error rule.

        If this fails: backward is wrong or imprecise. A missing softmax scale in the gradients of q and k, a forgotten
        term (rowsum of dO * O), a graph cut by `.detach()` or `.data`, or a parameter that forward does not use.
        """
        self.require("backward")
        self.check_gradients(self.make_case(device, any_dtype, input_scale=input_scale))

    def test_gradients_with_scale(self, device: str, dtype: str) -> None:
        """Gradients hold under a factor other than D ** -0.5.

        If this fails: backward uses the default scale, or uses the scale once where it belongs twice.
        """
        self.require("backward")
        self.require("softmax_scale")
        for softmax_scale in (0.0, 0.37):
            self.check_gradients(self.make_case(device, dtype, softmax_scale=softmax_scale))

    def test_gradients_with_causal(self, device: str, dtype: str) -> None:
        """Gradients hold under causal=True.

        If this fails: backward lets a query's gradient reach keys that forward did not show it.
        """
        self.require("backward")
        self.require("causal")
        self.check_gradients(self.make_case(device, dtype, causal=True))

    @pytest.mark.parametrize("group", ["pairs", "all"])
    def test_gradients_with_grouped_queries(self, device: str, dtype: str, group: str) -> None:
        """The gradient of a shared key head is the sum over its query heads.

        If this fails: only one query head of each group contributes, or heads are summed over the wrong group.
        """
        self.require("backward")
        self.require("gqa")
        heads = self.num_heads // 2 if group == "pairs" else 1
        self.check_gradients(self.make_case(device, dtype, num_kv_heads=heads))

    def test_gradients_with_cross_lengths(self, device: str, dtype: str) -> None:
        """Gradients hold where keys are more or fewer than queries.

        If this fails: backward takes a length from the wrong tensor.
        """
        self.require("backward")
        self.require("cross_attention")
        for length_q, length_k in cross_lengths(self):
            self.check_gradients(self.make_case(device, dtype, length_q=length_q, length_k=length_k))

    @pytest.mark.parametrize("length", [1, 63, 65, 127])
    def test_gradients_at_odd_lengths(self, device: str, dtype: str, length: int) -> None:
        """Gradients hold at lengths that no tile size divides.

        If this fails: backward writes or reads past the last, partial tile.
        """
        self.require("backward")
        if length not in self.supported_lengths([length]):
            pytest.skip(f"{self.backend} does not support {length} tokens; test_odd_lengths sees to the refusal")
        self.check_gradients(self.make_case(device, dtype, length_q=length))

    def test_gradients_with_strides(self, device: str, dtype: str) -> None:
        """Gradients hold for inputs that are not contiguous.

        If this fails: backward assumes the strides of a contiguous tensor, or gives gradients the wrong layout.
        """
        self.require("backward")
        for layout in ("packed", "heads_first"):
            self.check_gradients(self.make_case(device, dtype, layout=layout))

    def test_undeclared_backward_is_not_silent(self, device: str, dtype: str) -> None:
        """A backend that does not declare backward gives no gradients, instead of unchecked ones.

        If this fails: gradients flow although `backward` is not declared. Declare it, so that they are tested, or refuse
        inputs that require gradients.
        """
        self.forbid("backward")
        case, leaves = with_gradients(self.make_case(device, dtype))
        try:
            output = self.run(self.make_impl(case), case)
            if not output.requires_grad:
                return
            gradients(output, leaves, output.detach())
        except (RuntimeError, ValueError, NotImplementedError):
            return
        pytest.fail(f"{self.backend} does not declare backward, and its backward runs")
