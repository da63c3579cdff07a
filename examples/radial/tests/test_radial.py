import pytest
import torch

from attnmux import LocalAttention, UnsupportedRequestError
from attnmux.testing import dense_attention_oracle
from attnmux_radial.backend import RadialBuilder
from attnmux_radial.reference import visible_tokens


@pytest.mark.parametrize("grid", [(4, 8, 8), (5, 10, 14), (9, 1, 7)])
@pytest.mark.parametrize("width", [0.1, 1.0])
def test_equals_its_definition(grid, width):
    q, k, v = torch.randn(3, 1, grid[0] * grid[1] * grid[2], 2, 16, dtype=torch.float64)
    metadata = RadialBuilder().build(raw_latent_shape=grid, patch_size=(1, 1, 1), width=width)
    layer = LocalAttention(2, 16, backend="RADIAL_ATTN", dtype=torch.float64)
    visible = visible_tokens(grid, width)
    expected = dense_attention_oracle(q, k, v, softmax_scale=0.25, attn_mask=visible)
    assert torch.allclose(layer(q, k, v, attn_metadata=metadata), expected)


def test_lists_grow_more_slowly_than_the_square_of_the_frames():
    kept = [
        float(RadialBuilder().build(raw_latent_shape=(n, 32, 32), patch_size=(1, 1, 1)).index.counts.sum()) / n**2
        for n in (4, 16, 64)
    ]
    assert kept[0] > 1.5 * kept[1] > 2.25 * kept[2]


def test_width_of_nothing_is_refused():
    with pytest.raises(UnsupportedRequestError, match="width=0 must be greater than 0"):
        RadialBuilder().build(raw_latent_shape=(1, 8, 8), patch_size=(1, 1, 1), width=0)
