"""Sparsity by step and layer, dense calls, and adaptive tiles."""

import pytest
import torch
from vsa_scenarios import BASE, make_tensors

from attnmux.backends.sdpa import SDPAImpl
from attnmux.errors import UnsupportedRequestError
from attnmux_vsa import SparsitySchedule, VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from attnmux_vsa.ops import select_tiles, video_sparse_attention
from attnmux_vsa.prepare import adaptive_tiles, build_video_tiling, get_tile_tables


def build(step=0, sparsity=0.75, grid=(4, 8, 8), **options):
    return VideoSparseAttentionMetadataBuilder().build(step, grid, (1, 1, 1), sparsity, **options)


def test_sparsity_is_zero_then_rises_then_stays():
    schedule = SparsitySchedule(sparsity=0.8, dense_steps=2, ramp_steps=3)
    assert [round(schedule.at(step), 6) for step in range(7)] == [0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.8]
    assert SparsitySchedule(sparsity=0.5).at(0) == 0.5


def test_builder_takes_the_sparsity_of_the_step():
    schedule = SparsitySchedule(sparsity=0.75, dense_steps=1, dense_layers=(3, 0, 3))
    assert build(0, schedule).topk == 4
    assert build(1, schedule).topk == 1
    assert build(1, schedule).dense_layers == (0, 3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sparsity": 1.5}, r"sparsity=1\.5 must lie in \[0, 1\]"),
        ({"sparsity": 0.5, "dense_steps": -1}, r"dense_steps=-1 must be an integer >= 0"),
        ({"sparsity": 0.5, "ramp_steps": 1.5}, r"ramp_steps=1\.5 must be an integer >= 0"),
        ({"sparsity": 0.5, "dense_layers": ("a",)}, r"dense_layers=\('a',\) must be integers >= 0"),
    ],
)
def test_schedules_out_of_range_are_refused(fields, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        SparsitySchedule(**fields)


@pytest.mark.parametrize("how", ["step", "layer"])
def test_dense_steps_and_layers_give_the_bits_of_the_dense_backend(how):
    q, k, v, *_ = make_tensors(BASE.but(gate=False))
    schedule = SparsitySchedule(sparsity=0.75, dense_steps=1, dense_layers=(2,))
    impl = VideoSparseAttentionImpl(2, 32, prefix=f"blocks.{2 if how == 'layer' else 1}.attn")
    metadata = build(0 if how == "step" else 5, schedule)
    want = SDPAImpl(2, 32).forward(q, k, v)
    assert torch.equal(impl.forward(q, k, v, metadata), want)
    other = VideoSparseAttentionImpl(2, 32, layer_idx=1).forward(q, k, v, build(5, schedule))
    assert not torch.allclose(other, want)


def test_dense_layers_need_the_index_of_the_layer():
    q, k, v, *_ = make_tensors(BASE.but(gate=False))
    metadata = build(0, SparsitySchedule(sparsity=0.5, dense_layers=(1,)))
    with pytest.raises(
        UnsupportedRequestError, match=r"keep layers \(1,\) dense, but this layer does not know its index"
    ):
        VideoSparseAttentionImpl(2, 32).forward(q, k, v, metadata)
    with pytest.raises(UnsupportedRequestError, match=r"layer_idx=-1 must be an integer >= 0"):
        VideoSparseAttentionImpl(2, 32, layer_idx=-1)


@pytest.mark.parametrize("grid", [(5, 7, 3), (21, 30, 52), (1, 1, 1), (9, 8, 6)])
def test_adaptive_tiles_hold_every_token_once_in_fewer_tiles(grid):
    tables = get_tile_tables(grid, (4, 4, 4), "cpu", "adaptive")
    sizes = tables.variable_block_sizes
    length = grid[0] * grid[1] * grid[2]
    assert int(sizes.sum()) == length and int(sizes.min()) >= 1 and int(sizes.max()) <= 64
    assert sorted(tables.token_of_slot[tables.token_of_slot >= 0].tolist()) == list(range(length))
    assert torch.equal(tables.token_of_slot[tables.slot_of_token].long(), torch.arange(length))
    assert len(sizes) <= len(get_tile_tables(grid, (4, 4, 4), "cpu").variable_block_sizes)


def test_adaptive_tiles_of_81_frames_at_480p():
    tile_of_token, number = adaptive_tiles((21, 30, 52), (4, 4, 4))
    assert number <= 520
    assert build_video_tiling((21, 30, 52), topk=1).num_tiles == (6, 8, 13)
    # 5 x 7 x 13 tiles are those of the grid
    assert (torch.bincount(tile_of_token)[:455] == 64).all()


def test_adaptive_tiles_change_nothing_on_a_divisible_grid():
    plain, adaptive = (build_video_tiling((4, 8, 8), topk=2, tile_policy=p) for p in ("grid", "adaptive"))
    assert torch.equal(plain.slot_of_token, adaptive.slot_of_token)
    q, k, v, gate, _, _ = make_tensors(BASE)
    for a, b in zip(
        (video_sparse_attention(q, k, v, t, gate_compress=gate) for t in (plain,)),
        (video_sparse_attention(q, k, v, t, gate_compress=gate) for t in (adaptive,)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_padding_is_explained():
    text = build_video_tiling((21, 30, 52), topk=63).explain()
    assert "21 x 30 x 52 = 32760 tokens in 624 tiles of 64" in text
    assert "18.0% of the slots are padding" in text
    assert 'tile_policy="adaptive" needs' in text
    assert build_video_tiling((4, 8, 8), topk=1).explain().endswith("no padding.")
    assert build_video_tiling((5, 7, 3), topk=1, tile_policy="adaptive").explain().endswith("wasted on it.")


def test_unknown_policies_and_choices_are_refused():
    with pytest.raises(UnsupportedRequestError, match=r"tile_policy='best' is not known; expected one of"):
        build_video_tiling((4, 8, 8), topk=1, tile_policy="best")
    with pytest.raises(
        UnsupportedRequestError, match=r"conform='fp8' is not known; expected None or one of bf16-scores"
    ):
        VideoSparseAttentionImpl(2, 32, conform="fp8")


def test_conforming_choice_rounds_means_and_scores():
    """Two tiles whose scores differ by less than a bfloat16 step: the lower index wins the tie, not the larger score."""
    q = torch.ones(1, 128, 1, 16)
    k = torch.ones(1, 128, 1, 16)
    k[:, 64:] += 2.0**-12
    tiling = build_video_tiling((1, 1, 128), topk=1, tile_size=(1, 1, 64))
    assert select_tiles(q, k, tiling)[0, 0, 0].tolist() == [1]
    assert select_tiles(q, k, tiling, conform="bf16-scores")[0, 0, 0].tolist() == [0]
    impl = VideoSparseAttentionImpl(1, 16, conform="bf16-scores")
    v = torch.cat((torch.zeros(1, 64, 1, 16), torch.ones(1, 64, 1, 16)), 1)
    assert float(impl.forward(q, k, v, tiling).max()) == 0.0
