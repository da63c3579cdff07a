"""Defects known from published implementations of Video Sparse Attention, each by its symptom."""

import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnmux.errors import UnsupportedRequestError
from attnmux_vsa import (
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadataBuilder,
    construct_variable_block_sizes,
    get_non_pad_index,
    select_tiles,
    video_sparse_attention,
)
from attnmux_vsa.prepare import build_video_tiling, clear_tile_tables
from attnmux_vsa.reference import keep_top_tiles

GRID = (5, 7, 3)


def tensors(dtype=torch.float64, grid=GRID, count=4):
    generator = torch.Generator().manual_seed(5)
    S = grid[0] * grid[1] * grid[2]
    return [torch.randn(1, S, 2, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def test_no_gate_crashes_or_means_a_gate_of_one():
    q, k, v, gate = tensors()
    tiling = build_video_tiling(GRID, topk=2)
    impl, described = (
        VideoSparseAttentionImpl(2, 8),
        VideoSparseAttentionMetadataBuilder().build(0, GRID, (1, 1, 1), 0.5),
    )
    without = impl.forward(q, k, v, described, gate_compress=None)
    assert torch.equal(without, video_sparse_attention(q, k, v, tiling, gate_compress=torch.zeros_like(gate)))
    assert not torch.allclose(without, video_sparse_attention(q, k, v, tiling, gate_compress=torch.ones_like(gate)))


@pytest.mark.parametrize("gated", [False, True])
def test_softmax_scale_is_ignored(gated):
    q, k, v, gate = tensors()
    described = VideoSparseAttentionMetadataBuilder().build(0, GRID, (1, 1, 1), 0.0)
    gate = gate if gated else None
    scaled = VideoSparseAttentionImpl(2, 8, softmax_scale=0.05).forward(q, k, v, described, gate_compress=gate)
    default = VideoSparseAttentionImpl(2, 8).forward(q, k, v, described, gate_compress=gate)
    by_hand = VideoSparseAttentionImpl(2, 8).forward(q * 0.05 * 8**0.5, k, v, described, gate_compress=gate)
    torch.testing.assert_close(scaled, by_hand)
    assert not torch.allclose(scaled, default)


def test_softmax_scale_of_zero_is_taken_for_none():
    q, k, v, _ = tensors()
    described = VideoSparseAttentionMetadataBuilder().build(0, GRID, (1, 1, 1), 0.0)
    out = VideoSparseAttentionImpl(2, 8, softmax_scale=0.0).forward(q, k, v, described)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))


def test_causal_is_ignored():
    with pytest.raises(UnsupportedRequestError, match="causal=True"):
        VideoSparseAttentionImpl(2, 8, causal=True)


def test_nan_scores_choose_no_tile_and_give_zeros():
    q, k, v, _ = tensors()
    tiling = build_video_tiling(GRID, topk=2)
    bad_key = k.clone()
    bad_key[0, 0, 0, 0] = torch.nan
    kept = select_tiles(q, bad_key, tiling)
    assert kept.shape == (1, 2, 4, 2)
    assert (kept[0, 0] == 0).any(dim=-1).all()
    out = video_sparse_attention(q, bad_key, v, tiling)
    assert out[0, :, 0].isnan().all()
    assert torch.equal(out[0, :, 1], video_sparse_attention(q, k, v, tiling)[0, :, 1])
    everything = video_sparse_attention(torch.full_like(q, torch.nan), k, v, tiling)
    assert everything.isnan().all()


@pytest.mark.parametrize(
    ("scores", "topk"),
    [
        (torch.tensor([4.0, -5.0, *[0.0] * 62]), 3),
        (torch.cat([torch.tensor([30.0, -17.0]), torch.linspace(-1e-3, 1e-3, 1438)]).bfloat16().float(), 72),
    ],
)
def test_ties_keep_more_than_k_tiles(scores, topk):
    kept = keep_top_tiles(scores[None], topk)
    assert kept.shape == (1, topk)
    assert kept.unique().numel() == topk
    assert kept[0, 0] == 0


def test_scores_rounded_to_bfloat16_choose_other_tiles():
    # Two key tiles whose scores differ by less than bfloat16 resolves; the better one has the higher index.
    tiling = build_video_tiling((4, 4, 8), topk=1)
    q = torch.ones(1, 128, 1, 2, dtype=torch.bfloat16)
    k = torch.ones(1, 128, 1, 2, dtype=torch.bfloat16)
    in_second_tile = tiling.slot_of_token >= 64
    k[:, in_second_tile.nonzero()[0]] = 1.0078125
    assert select_tiles(q, k, tiling).flatten().tolist() == [1, 1]


def test_padding_of_short_tiles_pulls_their_means_towards_zero():
    # One tile of 64 tokens scores 1 and one of 16 scores 2: a mean over 64 slots would give it 0.5.
    q = torch.ones(1, 80, 1, 4, dtype=torch.float64)
    k = torch.full_like(q, 0.25)
    k[:, 64:] = 0.5
    tiling = build_video_tiling((5, 4, 4), topk=1)
    assert select_tiles(q, k, tiling).flatten().tolist() == [1, 1]
    v = k.clone()
    gated = video_sparse_attention(q, k, v, tiling, gate_compress=torch.ones_like(q), softmax_scale=0.0)
    # Fine keeps tile 0 at equal scores: 0.25; coarse is the mean of 0.25 and 0.5.
    torch.testing.assert_close(gated, torch.full_like(q, 0.25 + 0.375))


def test_grouped_query_heads_are_ignored_or_refused():
    q, k, v, _ = tensors()
    described = VideoSparseAttentionMetadataBuilder().build(0, GRID, (1, 1, 1), 0.5)
    grouped = VideoSparseAttentionImpl(2, 8, num_kv_heads=1).forward(q, k[:, :, :1], v[:, :, :1], described)
    repeated = [x[:, :, :1].expand_as(q) for x in (k, v)]
    torch.testing.assert_close(grouped, VideoSparseAttentionImpl(2, 8).forward(q, *repeated, described))


def test_latent_that_the_patch_does_not_divide_is_floored():
    with pytest.raises(UnsupportedRequestError, match="axis H of the latent has size 45, which the patch size 2"):
        VideoSparseAttentionMetadataBuilder().build(0, (21, 45, 80), (1, 2, 2), 0.9)


def test_float16_fails():
    q, k, v, gate = tensors(torch.float16)
    out = video_sparse_attention(q, k, v, build_video_tiling(GRID, topk=2), gate_compress=gate)
    assert out.dtype == torch.float16
    assert out.isfinite().all()


def test_layers_of_one_step_share_a_buffer_and_corrupt_the_retained_graph():
    described = VideoSparseAttentionMetadataBuilder().build(0, GRID, (1, 1, 1), 0.5)
    impl = VideoSparseAttentionImpl(2, 8)
    q, k, v, gate = (x.requires_grad_() for x in tensors())
    first = impl.forward(q, k, v, described, gate_compress=gate)
    alone = torch.autograd.grad(first.square().sum(), (q, k, v, gate), retain_graph=True)
    impl.forward(first, first * 2, first * 3, described, gate_compress=first)
    again = torch.autograd.grad(first.square().sum(), (q, k, v, gate))
    for before, after in zip(alone, again, strict=True):
        assert torch.equal(before, after)


def test_metadata_pins_a_buffer_of_the_size_of_the_batch():
    described = VideoSparseAttentionMetadataBuilder().build(0, GRID, (1, 1, 1), 0.5)
    before = len(pickle.dumps(described))
    q, k, v, gate = tensors()
    VideoSparseAttentionImpl(2, 8).forward(q, k, v, described, gate_compress=gate)
    assert len(pickle.dumps(described)) == before


def test_non_pad_index_of_equal_sizes_depends_on_which_tensor_came_first():
    sizes = construct_variable_block_sizes(GRID, (2, 2, 1))
    index = get_non_pad_index(sizes, 64)
    sizes[0] = 1
    assert get_non_pad_index(sizes, 64).numel() == index.numel() - 47


def test_tables_made_under_inference_mode_break_training():
    clear_tile_tables()
    with torch.inference_mode():
        q, k, v, _ = tensors()
        video_sparse_attention(q, k, v, build_video_tiling(GRID, topk=2))
    q, k, v, _ = (x.requires_grad_() for x in tensors())
    video_sparse_attention(q, k, v, build_video_tiling(GRID, topk=2)).sum().backward()
    assert q.grad.isfinite().all()


def test_tables_made_under_fake_tensors_outlive_them():
    clear_tile_tables()
    with FakeTensorMode():
        fake = build_video_tiling(GRID, topk=2)
        assert build_video_tiling(GRID, topk=2).slot_of_token is not fake.slot_of_token
    assert type(build_video_tiling(GRID, topk=2).slot_of_token) is torch.Tensor


@pytest.mark.parametrize("magnitude", [1.0, 4.0, 16.0])
def test_gradients_are_off_at_large_activations(magnitude):
    inputs = [(x * magnitude).requires_grad_() for x in tensors(torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    tiling = build_video_tiling(GRID, topk=2)
    for leaves in (inputs, exact):
        video_sparse_attention(*leaves[:3], tiling, gate_compress=leaves[3]).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-4
