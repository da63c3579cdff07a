"""Checks of `attn_mask` in each declared form."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from attnmux.testing.conformance.harness import ConformanceHarness

if TYPE_CHECKING:
    from attnmux.testing.conformance.cases import Case

__all__ = ["MASK_FORMS", "MaskChecks", "mask_for"]

MASK_FORMS = (
    ("bool", "full"),
    ("bool", "heads_broadcast"),
    ("bool", "two_dimensional"),
    ("bool", "empty_rows"),
    ("additive", "full"),
    ("additive", "two_dimensional"),
    ("additive", "empty_rows"),
    ("key_padding", "full"),
    ("key_padding", "empty_rows"),
)
"""(kind, form) of the masks that are tested."""


def mask_for(case: Case, kind: str, form: str, seed: int = 3) -> torch.Tensor:
    """Return a random mask for a case; only the form "empty_rows" has queries with nothing to attend."""
    B, length_q, H = case.q.shape[:3]
    length_k = case.k.shape[1]
    shape = {
        "heads_broadcast": (1, 1, length_q, length_k),
        "two_dimensional": (length_q, length_k),
    }.get(form, (B, H, length_q, length_k))
    if kind == "key_padding":
        shape = (B, 1, 1, length_k)
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(shape, generator=generator) < 0.7
    visible[..., 0] = True
    if form == "empty_rows":
        if kind == "key_padding":
            visible[-1] = False
        else:
            visible[..., ::5, :] = False
    if kind != "additive":
        return visible.to(case.q.device)
    bias = torch.randn(shape, generator=generator).masked_fill(~visible, float("-inf"))
    return bias.to(device=case.q.device, dtype=case.q.dtype)


class MaskChecks(ConformanceHarness):
    """A mask hides what it says, and nothing else."""

    def _masked_case(self, device: str, dtype: str, kind: str, form: str, **options: Any) -> Case:
        if kind not in self.capabilities.masks:
            pytest.skip(f"{self.backend} does not declare masks of form {kind!r}")
        case = self.make_case(device, dtype, **options)
        return dataclasses.replace(case, attn_mask=mask_for(case, kind, form))

    @pytest.mark.parametrize(("kind", "form"), MASK_FORMS)
    def test_mask(self, device: str, dtype: str, kind: str, form: str) -> None:
        """A bool mask keeps what is True, an additive one is added to the scaled scores; an empty row gives zeros.

        If this fails: the mask is dropped, inverted (True means attend), added before the scale, or not broadcast.
        NaN where a row is empty: softmax over nothing; give zeros there.
        """
        case = self._masked_case(device, dtype, kind, form)
        self.check_output(case)

    @pytest.mark.parametrize(("kind", "form"), [entry for entry in MASK_FORMS if entry[1] != "two_dimensional"])
    def test_mask_gradients(self, device: str, dtype: str, kind: str, form: str) -> None:
        """Gradients under a mask are those of the oracle; an empty row contributes zero, not NaN.

        If this fails: backward forgets the mask, or divides by the sum of an empty row.
        """
        self.require("backward")
        self.check_gradients(self._masked_case(device, dtype, kind, form))

    @pytest.mark.parametrize("kind", ["bool", "additive"])
    def test_mask_and_causal_combine(self, device: str, dtype: str, kind: str) -> None:
        """With causal=True and a mask, a query sees what both allow.

        If this fails: one of the two wins. torch's attention takes either a mask or is_causal, so combine them first.
        """
        self.require("causal")
        self.check_output(self._masked_case(device, dtype, kind, "full", causal=True))
