"""DistributedAttention against LocalAttention on the whole sequence, float64, on ranks that talk over gloo."""

import pytest

from attnmux.distributed import SeqPlan
from attnmux.distributed.plan import HeadPlan

SHAPES = [
    (length, batch, heads, kv_heads, text, rotary, padded)
    for length, batch, heads, kv_heads, text, rotary, padded in (
        (8, 1, 4, 4, 0, False, False),
        (9, 2, 4, 4, 0, True, False),
        (7, 2, 6, 3, 1, True, True),
        (9, 1, 6, 2, 7, True, True),
        (3, 2, 5, 5, 7, False, False),
        (2, 1, 5, 1, 1, True, True),
        (9, 2, 1, 1, 0, True, False),
        (5, 2, 4, 1, 7, False, True),
        (5, 1, 8, 2, 1, True, False),
    )
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_whole_sequence(pools, size, shape):
    length, batch, heads, kv_heads, text, _, padded = shape
    counts = pools(size).run("compare", *shape)
    plan = SeqPlan.padded(length, -(-length // size), size) if padded else SeqPlan.balanced(length, size)
    of = HeadPlan.of(heads, kv_heads, size)
    width = [last - first for first, last in of.q]
    both = [q + 2 * (kv[1] - kv[0]) for q, kv in zip(width, of.kv, strict=True)]
    for rank, found in enumerate(counts):
        if size == 1:
            assert found == (0, 0, 0, 0)
            continue
        others = [peer for peer in range(size) if peer != rank]
        to = plan.lengths[rank] * batch * 8 * sum(both[peer] for peer in others)
        back = sum(plan.lengths[peer] + text for peer in others) * batch * 8 * width[rank]
        to_backward = sum(plan.lengths[peer] for peer in others) * batch * 8 * both[rank]
        back_backward = (plan.lengths[rank] + text) * batch * 8 * sum(width[peer] for peer in others)
        assert found == (2, to + back, 2, to_backward + back_backward)


@pytest.mark.parametrize("size", [2, 4])
def test_sends_four_local_tensors_less_its_own_part(pools, size):
    local = 8 // size * 1 * 4 * 8
    for found in pools(size).run("compare", 8, 1, 4, 4, 0, False, False):
        assert found[:2] == (2, 4 * local * (size - 1) // size)


def test_causal_matches(pools):
    pools(2).run("compare", 9, 1, 4, 2, 0, True, True, True)


def test_one_rank_gives_the_bits_of_local_attention(pools):
    pools(1).run("one_rank_bits")


@pytest.mark.parametrize("size", [1, 2])
def test_compiles_without_graph_breaks(pools, size):
    pools(size).run("compiled")


def test_checkpointing_gives_the_same_gradients(pools):
    pools(2).run("checkpointed")


@pytest.mark.parametrize("field", ["dtype", "rows", "softmax_scale"])
def test_disagreement_names_rank_and_field(pools, field):
    messages = pools(2).run("disagree", field)
    for message in messages:
        assert f"ranks differ in {'lengths' if field == 'rows' else field}: rank" in message


def test_a_missing_rank_is_named_within_the_timeout(tmp_path):
    # ranks that failed to agree stay out of step: a pool of its own
    from pool import Pool

    pool = Pool(2, tmp_path)
    messages = pool.run("missing")
    pool.close()
    assert "before to_heads: rank 0 waited 1 s for rank 1, which did not come" in messages[0]
