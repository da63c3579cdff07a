"""BlockIndex: constructors, transpose, validation."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import BlockIndex

SIZES = {"block_q": 64, "block_k": 64}


@st.composite
def masks(draw):
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 11))
    seed, keep = draw(st.integers(0, 2**31)), draw(st.floats(0, 1))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, rows, columns, generator=generator) < keep


def mask_of_transpose(index):
    """The transposed lists as a mask, entry by entry."""
    offsets, entries, _ = index.transpose()
    batch, heads, number = offsets.shape[0], offsets.shape[1], index.num_key_blocks
    mask = torch.zeros(batch, heads, number, index.num_query_blocks, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for c in range(number):
                mask[b, h, c, entries[b, h, offsets[b, h, c] : offsets[b, h, c + 1]].long()] = True
    return mask


@given(masks())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_mask_survives_the_round_trip(mask):
    index = BlockIndex.from_block_mask(mask, **SIZES, validate="full")
    assert torch.equal(index.to_block_mask(), mask)
    assert index.blocks.shape[-1] == max(1, int(mask.sum(-1).max()))


@given(masks())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_transpose_is_the_transposed_mask_in_ascending_order(mask):
    index = BlockIndex.from_block_mask(mask, **SIZES)
    assert torch.equal(mask_of_transpose(index), mask.transpose(2, 3))
    offsets, entries, order = index.transpose()
    assert offsets.dtype == entries.dtype == order.dtype == torch.int32
    for row_offsets, row in zip(offsets.flatten(0, 1), entries.flatten(0, 1), strict=True):
        for first, last in pairwise(row_offsets):
            assert (row[first:last].diff() > 0).all()
    assert torch.equal(order.sort(-1).values, torch.arange(mask.shape[3], dtype=torch.int32).expand(order.shape))


@given(masks())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_transposing_twice_gives_the_index_back(mask):
    index = BlockIndex.from_block_mask(mask, **SIZES)
    once = BlockIndex.from_block_mask(mask_of_transpose(index), **SIZES)
    twice = BlockIndex.from_block_mask(mask_of_transpose(once), **SIZES)
    assert torch.equal(twice.counts, index.counts)
    assert torch.equal(twice.blocks, index.blocks)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_top_k_keeps_exactly_k_and_breaks_ties_by_the_lowest_block(rows, columns, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (1, 2, rows, columns), generator=generator).float()
    k = 1 + seed % columns
    index = BlockIndex.from_topk(scores, k, **SIZES, validate="full")
    assert (index.counts == k).all()
    for row, kept in zip(scores.flatten(0, 2), index.blocks.flatten(0, 2), strict=True):
        best = sorted(range(columns), key=lambda c: (-float(row[c]), c))[:k]
        assert kept.tolist() == sorted(best)


def test_top_k_compares_in_float32():
    """Scores that differ below the resolution of bfloat16 still order the blocks."""
    scores = torch.tensor([1.0, 1.0 + 2**-20, 1.0]).view(1, 1, 1, 3)
    assert BlockIndex.from_topk(scores, 1, **SIZES).blocks.flatten().tolist() == [1]


def test_a_predicate_sees_block_coordinates():
    index = BlockIndex.from_predicate(lambda q, k: (q - k).abs() <= 1, 4, 5, **SIZES)
    assert index.to_block_mask()[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_a_predicate_of_one_side_broadcasts():
    index = BlockIndex.from_predicate(lambda q, k: k < 2, 3, 4, **SIZES)
    assert index.to_block_mask().shape == (1, 1, 3, 4)


def test_the_transpose_is_kept_until_the_lists_change():
    index = BlockIndex.from_block_mask(torch.ones(1, 1, 2, 3, dtype=torch.bool), **SIZES)
    first = index.transpose()
    assert index.transpose() is first
    index.counts.fill_(1)
    assert index.transpose() is not first
    assert index.transpose().offsets.flatten().tolist() == [0, 2, 2, 2]


def test_hot_key_blocks_start_first():
    mask = torch.zeros(1, 1, 20, 30, dtype=torch.bool)
    mask[..., 7] = True
    mask[..., :20, :20] |= torch.eye(20, dtype=torch.bool)
    order = BlockIndex.from_block_mask(mask, **SIZES).transpose().order[0, 0]
    assert order.tolist() == [7, *range(7), *range(8, 30)]


def test_a_given_width_pads_the_lists():
    index = BlockIndex.from_block_mask(torch.eye(3, dtype=torch.bool), **SIZES, width=5, validate="full")
    assert index.blocks.shape == (1, 1, 3, 5)
    assert torch.equal(index.to_block_mask()[0, 0], torch.eye(3, dtype=torch.bool))


def test_a_row_longer_than_the_width_is_refused():
    with pytest.raises(RuntimeError, match="longer than width"):
        BlockIndex.from_block_mask(torch.ones(1, 3, dtype=torch.bool), **SIZES, width=2)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def build(blocks=((0, 2), (1, 0)), counts=(2, 1), number=3, **options):
    options = {**SIZES, **options}
    blocks = blocks if isinstance(blocks, torch.Tensor) else torch.tensor(blocks, dtype=torch.int32)[None, None]
    counts = counts if isinstance(counts, torch.Tensor) else int32(*counts)[None, None]
    return BlockIndex(blocks, counts, num_key_blocks=number, **options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block_q": 32}, r"block_q=32 is not supported; block sizes are 64, 128 and 256"),
        ({"block_k": 100}, r"block_k=100 is not supported"),
        ({"blocks": torch.zeros(1, 1, 2, 2)}, r"blocks must be int32 .*got torch.float32"),
        ({"blocks": torch.zeros(1, 2, 2, dtype=torch.int32)}, r"blocks must be int32 \[B, H, N_q, K\]"),
        (
            {"counts": int32(1, 1, 1)[None, None]},
            r"counts must have the shape of blocks .*\(1, 1, 2\); got \(1, 1, 3\)",
        ),
        ({"blocks": torch.zeros(1, 1, 2, 0, dtype=torch.int32)}, r"K >= 1"),
        ({"blocks": torch.zeros(1, 1, 2, 4, dtype=torch.int32)[..., ::2]}, r"must be contiguous"),
        ({"k_lengths": int32(1, 2)}, r"k_lengths must be int32 \[3\]"),
        ({"q_lengths": torch.ones(2)}, r"q_lengths must be int32"),
        ({"validate": "always"}, r"validate='always' is not known"),
    ],
)
def test_wrong_shapes_are_refused_by_name(change, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        build(**change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"counts": (3, 1)}, r"counts\[0, 0, 0\] = 3 lies outside 0 \.\. 2"),
        ({"counts": (-1, 1)}, r"counts\[0, 0, 0\] = -1"),
        ({"blocks": ((0, 3), (1, 0))}, r"blocks\[0, 0, 0, 1\] = 3 is out of range: there are 3 key blocks"),
        ({"blocks": ((-1, 2), (1, 0))}, r"blocks\[0, 0, 0, 0\] = -1 is out of range"),
        ({"blocks": ((2, 0), (1, 0))}, r"is not above the entry before it"),
        ({"blocks": ((1, 1), (1, 0))}, r"is not above the entry before it"),
        ({"k_lengths": int32(64, 65, 0)}, r"k_lengths\[0, 1\] = 65 lies outside 0 \.\. 64"),
        ({"q_lengths": int32(-1, 0)}, r"q_lengths\[0, 0\] = -1"),
    ],
)
def test_full_validation_refuses_wrong_values(change, text):
    build(**change)
    with pytest.raises(UnsupportedRequestError, match=text):
        build(**change, validate="full")


def test_entries_beyond_the_count_are_not_looked_at():
    build(blocks=((0, 2), (1, -7)), validate="full")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: BlockIndex.from_topk(torch.zeros(1, 1, 2, 3), 4, **SIZES), r"k=4 is out of range: 1 \.\. 3"),
        (lambda: BlockIndex.from_topk(torch.zeros(1, 1, 2, 3), 0, **SIZES), r"k=0 is out of range"),
        (
            lambda: BlockIndex.from_topk(torch.zeros(2, 3), 1, **SIZES),
            r"scores must be floating point \[B, H, N_q, N_k\]",
        ),
        (lambda: BlockIndex.from_block_mask(torch.zeros(2, 3), **SIZES), r"mask must be bool"),
        (lambda: BlockIndex.from_block_mask(torch.ones(2, 3) > 0, **SIZES, width=0), r"width=0 must be at least 1"),
        (
            lambda: BlockIndex.from_predicate(lambda q, k: q + k, 2, 2, **SIZES),
            r"predicate must return a bool tensor; got torch.int64",
        ),
        (
            lambda: BlockIndex.from_predicate(lambda q, k: True, 2, 2, **SIZES),
            r"predicate must return a bool tensor; got bool",
        ),
    ],
)
def test_constructors_refuse_by_name(call, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        call()


def test_an_index_says_what_it_is():
    assert repr(build(k_lengths=int32(64, 64, 3))) == (
        "BlockIndex(blocks=(1, 1, 2, 2), num_key_blocks=3, block_q=64, block_k=64, k_lengths)"
    )


def test_the_lists_of_some_heads_are_a_view_that_follows_changes_in_place():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 5, 4, 6, generator=generator) < 0.5
    index = BlockIndex.from_block_mask(mask, **SIZES)
    some = index.of_heads(1, 4)
    assert torch.equal(some.to_block_mask(), mask[:, 1:4])
    assert some.blocks.data_ptr() == index.blocks[:, 1:].data_ptr()
    assert index.of_heads(1, 4) is some
    assert torch.equal(mask_of_transpose(some), mask[:, 1:4].transpose(2, 3))
    index.counts.zero_()
    assert not some.to_block_mask().any()
    assert not mask_of_transpose(index.of_heads(1, 4)).any()
    assert torch.equal(index.of_heads(0, 2).counts, index.counts[:, :2])


def test_lists_that_all_heads_share_are_those_of_any_of_them():
    index = BlockIndex.from_block_mask(torch.ones(3, 3, dtype=torch.bool), **SIZES)
    assert index.of_heads(1, 2) is index
