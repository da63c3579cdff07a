"""Checks of the output's values against the float64 oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from attnmux.errors import UnsupportedRequestError
from attnmux.testing.conformance.harness import ConformanceHarness
from attnmux.testing.inputs import INPUT_SCALES, LAYOUTS, ODD_LENGTHS
from attnmux.testing.tolerance import (
    ErrorMeasure,
    assert_close_to_oracle,
    dense_attention_baseline,
    dense_attention_oracle,
    measure_error,
    visible_keys,
)

__all__ = ["ValueChecks", "cross_lengths"]


def cross_lengths(checks: ConformanceHarness) -> list[tuple[int, int]]:
    """Return (S_q, S_k) with more keys than queries and the reverse."""
    short, long = checks.pick_length(33), checks.pick_length(checks.typical_length + 5)
    return [(short, long), (long, short)]


class ValueChecks(ConformanceHarness):
    """What comes out is what the oracle says."""

    @pytest.mark.parametrize("input_scale", INPUT_SCALES)
    def test_output_equals_oracle(self, device: str, any_dtype: str, input_scale: float) -> None:
        """The output obeys the error rule against the float64 oracle, at inputs of size 1, 4 and 16.

        If this fails: the method itself is wrong, or it loses precision. Look at the softmax (subtract the row maximum,
        keep sums in float32), at heads and tokens that change places ([B, S, H, D] is not [B, H, S, D]), and at scores
        kept in half precision. If it fails at one input scale only, a value overflows or underflows. A backend that is
        not exact needs its own `oracle()`.
        """
        self.check_output(self.make_case(device, any_dtype, input_scale=input_scale))

    @pytest.mark.parametrize("softmax_scale", [0.0, 0.37])
    def test_softmax_scale_is_honoured(self, device: str, dtype: str, softmax_scale: float) -> None:
        """A factor other than D ** -0.5 is used as given; 0.0 is a value and weighs all keys alike.

        If this fails: `forward` computes D ** -0.5 itself instead of reading `self.softmax_scale`, or tests the scale
        for truth (`scale or default`), which turns 0.0 into the default. Compare with None. A kernel that folds the scale into
        q before rounding loses precision.
        """
        self.require("softmax_scale")
        self.check_output(self.make_case(device, dtype, softmax_scale=softmax_scale))

    @pytest.mark.parametrize("length", [1, 65])
    def test_causal(self, device: str, dtype: str, length: int) -> None:
        """With causal=True a query sees keys up to its own position.

        If this fails: the constructor's `causal` does not reach the computation, or the diagonal is off by one.
        """
        self.require("causal")
        self.check_output(self.make_case(device, dtype, length_q=self.pick_length(length), causal=True))

    def test_causal_cross_is_bottom_right(self, device: str, dtype: str) -> None:
        """With causal=True and S_q != S_k the last query is aligned with the last key, or the call is refused.

        If this fails: the mask is aligned top left (torch's is_causal=True does that; tril(S_k - S_q) is right), or queries
        that come before every key are not zeros.
        """
        self.require("causal")
        self.require("cross_attention")
        for length_q, length_k in cross_lengths(self):
            case = self.make_case(device, dtype, length_q=length_q, length_k=length_k, causal=True)
            try:
                self.check_output(case, what=f"output for S_q={length_q}, S_k={length_k}")
            except UnsupportedRequestError as error:
                refusal = str(error)
            else:
                continue
            assert "causal" in refusal, f"the refusal does not name what it refuses, causal: {refusal}"

    @pytest.mark.parametrize("group", ["pairs", "all"])
    def test_grouped_queries(self, device: str, dtype: str, group: str) -> None:
        """With fewer key heads than query heads, query head h reads key head h // (H / H_kv).

        If this fails: `num_kv_heads` is ignored, or keys are tiled (0 1 0 1) where they must be repeated (0 0 1 1).
        """
        self.require("gqa")
        heads = self.num_heads // 2 if group == "pairs" else 1
        self.check_output(self.make_case(device, dtype, num_kv_heads=heads))

    def test_cross_lengths(self, device: str, dtype: str) -> None:
        """Keys may be more or fewer than queries.

        If this fails: a shape, a grid or a bound is taken from q where k's belongs, or the reverse.
        """
        self.require("cross_attention")
        for length_q, length_k in cross_lengths(self):
            self.check_output(
                self.make_case(device, dtype, length_q=length_q, length_k=length_k),
                what=f"output for S_q={length_q}, S_k={length_k}",
            )

    @pytest.mark.parametrize("length", ODD_LENGTHS)
    def test_odd_lengths(self, device: str, dtype: str, length: int) -> None:
        """Lengths that no tile size divides are right, or refused where `supported_lengths` leaves them out.

        If this fails: the last, partial tile is read past its end or its padding counts as keys; mask it by the true
        length. If the message speaks of a refusal, the backend must raise UnsupportedRequestError that names the length.
        """
        if length in self.supported_lengths([length]):
            self.check_output(self.make_case(device, dtype, batch=1, length_q=length))
            return
        # the metadata builder may refuse as well as the impl
        with pytest.raises(UnsupportedRequestError, match=rf"\b{length}\b"):
            self._run_at_length(device, dtype, length)

    def _run_at_length(self, device: str, dtype: str, length: int) -> None:
        case = self.make_case(device, dtype, length_q=length)
        self.run(self.make_impl(case), case)

    def test_head_sizes(self, device: str, dtype: str) -> None:
        """The smallest and the largest declared head size work, and one in between.

        If this fails: a head size is declared that the kernel does not cover, or D is padded and the padding counts.
        """
        sizes = sorted(self.capabilities.head_sizes)
        for size in sorted({sizes[0], sizes[len(sizes) // 3], sizes[-1]}):
            case = self.make_case(device, dtype, batch=1, length_q=self.pick_length(17), head_size=size)
            self.check_output(case, what=f"output for head_size={size}")

    @pytest.mark.parametrize("layout", LAYOUTS[1:])
    def test_strides_are_honoured(self, device: str, dtype: str, layout: str) -> None:
        """Inputs may have any strides with D contiguous; the memory between the values is NaN here.

        If this fails: strides are assumed (a kernel gets q's strides for k, or a `view` reinterprets memory), or elements
        beside the tensor are read.
        """
        case = self.make_case(device, dtype, layout=layout)
        self.check_output(case)
        mixed = self.make_case(device, dtype)
        self.check_output(dataclasses.replace(mixed, q=case.q), what="output with k and v contiguous, q not")

    def test_lse(self, device: str, any_dtype: str) -> None:
        """With return_lse=True the second result is the log-sum-exp of the scaled scores: [B, H, S_q], float32, natural.

        If this fails: the kernel works in base 2 (multiply its LSE by ln 2), leaves out the scale or the row maximum, or
        returns [B, S_q, H]. The output must be the same as without return_lse.
        """
        self.require("returns_lse")
        if self.capabilities.exactness != "exact" and type(self).oracle_lse is ConformanceHarness.oracle_lse:
            pytest.fail(f"{self.backend} is not exact and declares returns_lse: override oracle_lse()")
        variants: list[dict[str, Any]] = [{}, {"causal": True}] if self.capabilities.causal else [{}]
        for options in variants:
            case = self.make_case(device, any_dtype, **options)
            impl = self.make_impl(case)
            with torch.no_grad():
                output, lse = self.run(impl, case, return_lse=True)
            self.check_output(case, impl=impl, result=output, what="output with return_lse=True")
            self._check_lse(case.q, case.k, case.metadata, lse, **options)

    def test_empty_rows_have_lse_minus_infinity(self, device: str, dtype: str) -> None:
        """A query with nothing to attend has an LSE of -inf.

        If this fails: the LSE of an empty row is 0, NaN, +inf or a large negative number; write -inf.
        """
        self.require("returns_lse")
        if "bool" not in self.capabilities.masks:
            pytest.skip(f"{self.backend} does not declare bool masks, without which no row is empty")
        case = self.make_case(device, dtype)
        mask = torch.ones(case.q.shape[1], case.k.shape[1], dtype=torch.bool, device=case.q.device)
        mask[3] = False
        case = dataclasses.replace(case, attn_mask=mask)
        _, lse = self.run(self.make_impl(case), case, return_lse=True)
        assert (lse[:, :, 3] == float("-inf")).all(), f"LSE of a query with nothing to attend: {lse[0, 0, 3].item()}"
        assert lse[:, :, :3].isfinite().all(), "the LSE of queries that have keys is not finite"

    def _check_lse(
        self, q: torch.Tensor, k: torch.Tensor, metadata: object, lse: torch.Tensor, *, causal: bool = False
    ) -> None:
        shape = [q.shape[0], q.shape[2], q.shape[1]]
        assert list(lse.shape) == shape, f"LSE has shape {list(lse.shape)}, expected [B, H, S_q] = {shape}"
        assert lse.dtype == torch.float32, f"LSE is {lse.dtype}, expected torch.float32"
        scale = q.shape[-1] ** -0.5
        oracle = self.oracle_lse(q.double(), k.double(), metadata, softmax_scale=scale, causal=causal, attn_mask=None)  # type: ignore[arg-type]
        scores = (q.float().transpose(1, 2) * scale) @ k.float().transpose(1, 2).transpose(-1, -2)
        visible = visible_keys(q.shape[1], k.shape[1], causal=causal, attn_mask=None, device=q.device)
        baseline = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
        # dense against dense, also for a backend that is not: another method's distance is no rounding error
        dense = dense_attention_oracle(q, k, k, softmax_scale=scale, causal=causal, return_lse=True)[1]
        errors = measure_error(baseline, dense)
        empty = oracle == float("-inf")
        assert (lse[empty] == float("-inf")).all(), "the LSE of a query with nothing to attend is not -inf"
        lse, oracle = lse.masked_fill(empty, 0.0), oracle.masked_fill(empty, 0.0)
        if q.dtype in (torch.float16, torch.bfloat16):
            # kernels for half precision take a faster exponential; an error of eps / 16 in the LSE changes a row of
            # outputs by a 16th of what rounding them does
            fast = torch.finfo(q.dtype).eps / 32 / oracle.abs().max().item()
            errors = errors.worst(ErrorMeasure(largest_relative=fast))
        assert_close_to_oracle(lse, oracle, errors, what="LSE")

    def test_dense_limit_equals_dense(self, device: str, any_dtype: str) -> None:
        """A backend that is not exact equals dense attention where everything is kept.

        If this fails: something is lost even when nothing should be (a tile, a row of padding, a term), or `dense_limit`
        does not describe that limit. A method without such a limit declares it in `deviations`.
        """
        if self.capabilities.exactness == "exact":
            pytest.skip(f"{self.backend} is exact: test_output_equals_oracle says the same")
        case = self.make_case(device, any_dtype)
        limit = self.dense_limit(case.q, case.k)
        if limit is None:
            pytest.fail(f"{self.backend} is {self.capabilities.exactness}, not exact: override dense_limit()")
        case = dataclasses.replace(case, metadata=limit.metadata, extra_inputs=dict(limit.extra_inputs))
        impl = self.make_impl(case, impl_args={**self.impl_args, **limit.impl_args})
        with torch.no_grad():
            output = self.run(impl, case)
        oracle = dense_attention_oracle(case.q, case.k, case.v)
        assert_close_to_oracle(
            output, oracle, dense_attention_baseline(case.q, case.k, case.v), what="output at the limit"
        )
