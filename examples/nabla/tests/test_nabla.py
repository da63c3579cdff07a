import pytest
import torch

from attnmux import LocalAttention, UnsupportedRequestError
from attnmux.testing import dense_attention_oracle
from attnmux_nabla.backend import NablaBuilder
from attnmux_nabla.reference import visible_tokens


@pytest.mark.parametrize("grid", [(2, 8, 16), (3, 9, 13), (1, 3, 70)])
@pytest.mark.parametrize("threshold", [0.2, 0.7, 1.0])
def test_equals_its_definition(grid, threshold):
    q, k, v = torch.randn(3, 2, grid[0] * grid[1] * grid[2], 2, 16, dtype=torch.float64)
    metadata = NablaBuilder().build(raw_latent_shape=grid, patch_size=(1, 1, 1), threshold=threshold)
    layer = LocalAttention(2, 16, softmax_scale=4.0, backend="NABLA_ATTN", dtype=torch.float64)
    visible = visible_tokens(q, k, grid, 4.0, threshold)
    expected = dense_attention_oracle(q, k, v, softmax_scale=4.0, attn_mask=visible)
    assert torch.allclose(layer(q, k, v, attn_metadata=metadata), expected)
    assert visible.all() == (threshold == 1.0)


def test_threshold_outside_of_its_range_is_refused():
    with pytest.raises(UnsupportedRequestError, match=r"threshold=0 must be in \(0, 1\]"):
        NablaBuilder().build(raw_latent_shape=(1, 8, 8), patch_size=(1, 1, 1), threshold=0)
