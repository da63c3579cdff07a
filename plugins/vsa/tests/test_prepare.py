import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmux.errors import UnsupportedRequestError
from attnmux_vsa import prepare
from attnmux_vsa.prepare import (
    VSA_TILE_SIZE,
    build_video_tiling,
    construct_variable_block_sizes,
    count_kept_tiles,
    count_tiles,
    get_non_pad_index,
    get_reverse_tile_partition_indices,
    get_tile_partition_indices,
    get_tile_tables,
    tile_tokens,
    token_grid,
    untile_tokens,
)

axis = st.integers(1, 9)
grids = st.tuples(axis, axis, axis)
tiles = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
fast = settings(max_examples=40, deadline=None, derandomize=True)


def naive_order(grid, tile):
    """Raster positions in tiled order by seven nested loops."""
    order = []
    T, H, W = grid
    for t0 in range(0, T, tile[0]):
        for h0 in range(0, H, tile[1]):
            for w0 in range(0, W, tile[2]):
                for t in range(t0, min(t0 + tile[0], T)):
                    for h in range(h0, min(h0 + tile[1], H)):
                        order += [(t * H + h) * W + w for w in range(w0, min(w0 + tile[2], W))]
    return order


def test_tile_is_that_of_the_published_checkpoints():
    assert VSA_TILE_SIZE == (4, 4, 4)


def test_order_of_a_small_grid_has_exact_values():
    indices = get_tile_partition_indices((2, 2, 4), (1, 2, 2), "cpu")
    assert indices.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert indices.dtype == torch.int64


def test_order_of_a_grid_with_short_tiles_has_exact_values():
    assert get_tile_partition_indices((1, 3, 3), (4, 2, 2), "cpu").tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert get_reverse_tile_partition_indices((1, 3, 3), (4, 2, 2), "cpu").tolist() == [0, 1, 4, 2, 3, 5, 6, 7, 8]


def test_sizes_of_a_grid_with_short_tiles_have_exact_values():
    sizes = construct_variable_block_sizes((5, 7, 3), (2, 2, 1), "cpu")
    assert sizes.tolist() == [48, 36, 12, 9]
    assert sizes.dtype == torch.int32


def test_valid_slots_come_first_in_each_tile():
    index = get_non_pad_index(torch.tensor([3, 1, 4]), 4)
    assert index.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    assert index.dtype == torch.int64


def test_slots_of_a_small_grid_have_exact_values():
    assert get_tile_tables((1, 3, 3), (4, 2, 2), "cpu").slot_of_token.tolist() == [
        0, 1, 16, 2, 3, 17, 32, 33, 48,
    ]  # fmt: skip


@fast
@given(grids, tiles)
def test_order_is_that_of_nested_loops(grid, tile):
    assert get_tile_partition_indices(grid, tile, "cpu").tolist() == naive_order(grid, tile)


@fast
@given(grids, tiles)
def test_reverse_undoes_the_order(grid, tile):
    forth = get_tile_partition_indices(grid, tile, "cpu")
    back = get_reverse_tile_partition_indices(grid, tile, "cpu")
    everyone = torch.arange(math.prod(grid))
    assert torch.equal(forth.sort().values, everyone)
    assert torch.equal(forth[back], everyone)


@fast
@given(grids, tiles)
def test_sizes_are_in_range_and_sum_to_the_tokens(grid, tile):
    counts = count_tiles(grid, tile)
    sizes = construct_variable_block_sizes(grid, counts, "cpu", tile_size=tile)
    assert sizes.shape == (math.prod(counts),)
    assert int(sizes.sum()) == math.prod(grid)
    assert 1 <= int(sizes.min()) <= int(sizes.max()) <= math.prod(tile)
    slots = get_non_pad_index(sizes, math.prod(tile))
    assert torch.equal(get_tile_tables(grid, tile, "cpu").non_pad_index, slots)
    assert torch.equal(torch.bincount(slots // math.prod(tile), minlength=len(sizes)), sizes.long())


@fast
@given(grids, tiles)
def test_untiling_undoes_tiling_and_padding_is_zero(grid, tile):
    tables = get_tile_tables(grid, tile, "cpu")
    num_tiles, volume = len(tables.variable_block_sizes), math.prod(tile)
    x = torch.arange(1.0, 1 + 2 * math.prod(grid) * 6).view(2, -1, 3, 2)
    tiled = tile_tokens(x, tables.slot_of_token, num_tiles, volume)
    assert tiled.shape == (2, 3, num_tiles, volume, 2)
    assert torch.equal(untile_tokens(tiled, tables.slot_of_token), x)
    assert int((tiled != 0).sum()) == x.numel()
    flat = tiled.permute(0, 2, 3, 1, 4).flatten(1, 2)
    assert torch.equal(flat[:, tables.non_pad_index], x[:, tables.tile_partition_indices])


@pytest.mark.parametrize(
    ("sparsity", "num_tiles", "kept"),
    # 0.7 and 0.95 are the float artefacts that published checkpoints were trained with.
    [(0, 8, 8), (1, 8, 1), (0.5, 8, 4), (0.5, 7, 4), (0.9, 1440, 144), (0.7, 10, 4), (0.7, 1440, 433), (0.95, 20, 2),
     (0.95, 100, 6), (0.95, 1440, 73), (0.9999, 3, 1), (0.0, 1, 1)],
)  # fmt: skip
def test_kept_tiles_follow_the_published_float_formula(sparsity, num_tiles, kept):
    assert count_kept_tiles(sparsity, num_tiles) == kept


@fast
@given(st.floats(0, 1), st.integers(1, 5000))
def test_kept_tiles_are_at_least_one_and_at_most_all(sparsity, num_tiles):
    assert 1 <= count_kept_tiles(sparsity, num_tiles) <= num_tiles


@pytest.mark.parametrize("sparsity", [-0.1, 1.0001, float("nan"), float("inf"), -float("inf")])
def test_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(UnsupportedRequestError, match=r"sparsity=\S+ .* must lie in \[0, 1\]"):
        count_kept_tiles(sparsity, 8)


@pytest.mark.parametrize("topk", [0, -1, 9, 2.0, True, "all"])
def test_topk_outside_the_tiles_is_refused(topk):
    with pytest.raises(UnsupportedRequestError, match=r"topk=.* must be an integer in \[1, 8\]"):
        build_video_tiling((8, 8, 8), topk=topk)


def test_both_topk_and_sparsity_are_refused():
    with pytest.raises(UnsupportedRequestError, match=r"topk=2 and a sparsity of 0\.5 both say"):
        build_video_tiling((8, 8, 8), topk=2, sparsity=0.5)


def test_neither_topk_nor_sparsity_is_refused():
    with pytest.raises(UnsupportedRequestError, match="neither a sparsity nor topk was given"):
        build_video_tiling((8, 8, 8))


def test_token_grid_divides_the_latent_by_the_patch():
    assert token_grid((21, 60, 104), (1, 2, 2)) == (21, 30, 52)


@pytest.mark.parametrize(
    ("latent", "patch", "text"),
    [
        ((5, 8, 8), (2, 2, 2), "axis T of the latent has size 5, which the patch size 2 does not divide"),
        ((4, 9, 8), (1, 2, 2), "axis H of the latent has size 9, which the patch size 2 does not divide"),
        ((4, 8, 10), (1, 2, 4), "axis W of the latent has size 10, which the patch size 4 does not divide"),
    ],
)
def test_latent_that_the_patch_does_not_divide_is_refused_with_the_axis(latent, patch, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        token_grid(latent, patch)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 4), (0, 4, 4), (4, -1, 4), (4, 4, 2.0), (True, 4, 4)])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("dit_seq_shape", lambda shape: get_tile_partition_indices(shape, (4, 4, 4), "cpu")),
        ("tile_size", lambda shape: get_reverse_tile_partition_indices((4, 4, 4), shape, "cpu")),
        ("raw_latent_shape", lambda shape: token_grid(shape, (1, 1, 1))),
        ("patch_size", lambda shape: token_grid((4, 4, 4), shape)),
    ],
)
def test_what_is_no_triple_of_sizes_is_refused_by_name(name, call, shape):
    with pytest.raises(UnsupportedRequestError, match=rf"{name} must be three integers >= 1 along T, H and W, got \("):
        call(shape)


def test_tile_counts_of_another_grid_are_refused():
    with pytest.raises(
        UnsupportedRequestError, match=r"num_tiles=\(1, 2, 1\) does not fit: a grid \(5, 7, 3\) has \(2, 2,"
    ):
        construct_variable_block_sizes((5, 7, 3), (1, 2, 1), "cpu")


def test_tables_of_one_grid_are_shared_and_those_of_another_are_not():
    first = get_tile_tables((5, 7, 3), VSA_TILE_SIZE, "cpu")
    assert get_tile_tables((5, 7, 3), VSA_TILE_SIZE, torch.device("cpu")) is first
    assert get_tile_tables([5, 7, 3], VSA_TILE_SIZE, "cpu") is first
    assert get_tile_tables((5, 7, 3), (4, 4, 2), "cpu") is not first
    assert get_tile_tables((5, 3, 7), VSA_TILE_SIZE, "cpu") is not first


def test_kept_tables_are_bounded_and_can_be_let_go():
    prepare.clear_tile_tables()
    for size in range(1, 40):
        get_tile_tables((1, 1, size), VSA_TILE_SIZE, "cpu")
    assert prepare._cached_tables.cache_info().currsize == 16
    prepare.clear_tile_tables()
    assert prepare._cached_tables.cache_info().currsize == 0


def test_tilings_are_equal_by_their_plain_fields():
    one, same, other = (build_video_tiling((5, 7, 3), topk=topk) for topk in (2, 2, 3))
    assert one == same
    assert one != other
    assert "slot_of_token" not in repr(one)


def test_tiling_survives_pickling():
    tiling = build_video_tiling((5, 7, 3), sparsity=0.5)
    back = pickle.loads(pickle.dumps(tiling))
    assert back == tiling
    assert torch.equal(back.slot_of_token, tiling.slot_of_token)
