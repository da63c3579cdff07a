import pytest
import torch

from attnmux_window import ops, reference


@pytest.mark.parametrize("length", [1, 15, 16, 65])
@pytest.mark.parametrize("window", [1, 8, 100])
def test_operator_equals_its_definition(length, window):
    q, k, v = torch.randn(3, 2, length, 3, 8, dtype=torch.float64)
    expected = reference.window_attention(q, k, v, window=window, softmax_scale=0.3)
    assert torch.allclose(ops.window_attention(q, k, v, window=window, softmax_scale=0.3), expected)
