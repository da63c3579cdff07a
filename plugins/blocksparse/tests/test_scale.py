"""The factor on the scores and the type that is computed in, here and in the operators of other packages around this one."""

import pytest
import torch

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse.prepare import compute_dtype, resolve_scale


def test_scale_is_a_value_or_the_usual_one():
    assert resolve_scale(None, 64) == 0.125
    assert resolve_scale(0.0, 64) == 0.0


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(UnsupportedRequestError, match="softmax_scale must be finite"):
        resolve_scale(scale, 64)


def test_only_float64_is_computed_in_float64():
    assert compute_dtype(torch.float64) == torch.float64
    assert {compute_dtype(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
