import pytest
import torch

from attnmux.backend import LayerPlace
from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import select_top_blocks
from attnmux_sla import TopkRule, get_block_map, mean_pool, select_blocks
from attnmux_sla.prepare import count_kept_blocks, order_of_scale, pool_blocks


def rows(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("ratio", "blocks", "kept"),
    [
        (0.1, 1, 1),
        (0.1, 9, 1),
        (0.05, 18, 1),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.1, 512, 51),
        (1.0, 7, 7),
        (1e-9, 5, 1),
    ],
)
def test_kept_blocks_are_floored_but_never_none(ratio, blocks, kept):
    assert count_kept_blocks(ratio, blocks) == kept


def test_protected_blocks_raise_the_number_kept_up_to_all():
    assert count_kept_blocks(0.1, 20, 5) == 5
    assert count_kept_blocks(0.5, 20, 5) == 10
    assert count_kept_blocks(0.1, 3, 5) == 3


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), True])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(UnsupportedRequestError, match=r"topk_ratio must be a fraction of the key blocks in \(0, 1\]"):
        count_kept_blocks(ratio, 10)


def test_order_is_the_sign_of_the_scale():
    assert [order_of_scale(scale) for scale in (0.3, 0.0, -2.0)] == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_the_last_block_is_averaged_over_the_tokens_it_has(length):
    x = rows(2, length, 3, 8)
    expected = torch.stack([part.mean(1) for part in x.split(64, dim=1)], 2)
    torch.testing.assert_close(pool_blocks(x, 64), expected)
    torch.testing.assert_close(mean_pool(x.transpose(1, 2), 64), expected)


def test_public_pooling_keeps_the_dtype():
    assert mean_pool(rows(1, 2, 70, 8, dtype=torch.bfloat16), 64).dtype == torch.bfloat16


def test_lists_ascend_and_equal_scores_keep_the_lower_block():
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 6, 4)
    k[0, 0, 4] = 2
    assert select_top_blocks(q, k, 3).tolist() == [[[[0, 1, 4]] * 2]]


def test_nan_comes_first_and_protected_blocks_before_it():
    q, k = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 6, 4)
    k[0, 0, 5, 0] = torch.nan
    assert select_top_blocks(q, k, 2).flatten().tolist() == [0, 5]
    assert select_top_blocks(q, k, 2, protected=2).flatten().tolist() == [0, 1]


def test_grouped_heads_choose_for_themselves():
    q, k = rows(1, 4, 2, 8), rows(1, 2, 9, 8, seed=1)
    for head in range(4):
        alone = select_top_blocks(q[:, head : head + 1], k[:, head // 2 : head // 2 + 1], 3)
        assert torch.equal(select_top_blocks(q, k, 3)[:, head : head + 1], alone)


def test_protected_tokens_stay_chosen():
    q, k = rows(1, 400, 2, 16), rows(1, 900, 2, 16, seed=1)
    index = select_blocks(q, k, topk_ratio=0.3, protected_tokens=70)
    assert index.blocks.shape[-1] == 4
    assert (index.blocks[..., :2] == torch.tensor([0, 1])).all()
    alone = select_blocks(q, k, topk_ratio=0.01, protected_tokens=200)
    assert (alone.blocks == torch.arange(4)).all()


def test_the_public_map_agrees_with_its_lists():
    q, k = rows(1, 4, 200, 16), rows(1, 2, 330, 16, seed=1)
    block_map, lists, topk = get_block_map(q, k, 0.5, BLKQ=128, BLKK=64)
    assert (topk, block_map.dtype, block_map.shape, lists.dtype) == (3, torch.int8, (1, 4, 2, 6), torch.int64)
    assert torch.equal(torch.zeros_like(block_map).scatter(-1, lists, 1), block_map)
    assert torch.equal(lists, lists.sort(-1).values)


class TestTopkRule:
    def test_ranges_include_both_ends(self):
        rule = TopkRule(0.5, layers=(1, 3), steps=(0, 9))
        assert [rule.covers_layer(LayerPlace(layer)) for layer in (0, 1, 3, 4, None)] == [
            False,
            True,
            True,
            False,
            False,
        ]
        assert [rule.covers_step(step) for step in (0, 9, 10)] == [True, True, False]
        assert TopkRule(0.5).covers_layer(LayerPlace(None))

    @pytest.mark.parametrize("field", ["layers", "steps"])
    @pytest.mark.parametrize("bounds", [(3, 1), (-1, 2), (1,)])
    def test_a_range_that_does_not_ascend_is_refused(self, field, bounds):
        with pytest.raises(UnsupportedRequestError, match=rf"{field} must be \(first, last\) with 0 <= first <= last"):
            TopkRule(0.5, **{field: bounds})

    def test_a_ratio_out_of_range_is_refused(self):
        with pytest.raises(UnsupportedRequestError, match="topk_ratio"):
            TopkRule(2.0)
