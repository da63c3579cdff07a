"""Ring, usp and allgather_kv against LocalAttention on the whole sequence, and what each sends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmux import SeqPlan

DIM = 8
# tokens, batch, query heads, key heads, text tokens, rotary, padded
SHAPES = [
    (9, 2, 4, 4, 0, True, False),
    (7, 2, 6, 3, 1, True, True),
    (9, 1, 6, 2, 7, False, True),
    (2, 1, 5, 1, 1, True, True),
    (3, 2, 5, 5, 7, False, False),
    (6, 2, 1, 1, 0, False, True),
]
ACROSS = ["ring", "allgather_kv"]


def plan_of(length, size, padded):
    return SeqPlan.padded(length, -(-length // size) + 1, size) if padded else SeqPlan.balanced(length, size)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("strategy", ACROSS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_whole_sequence_and_sends_what_it_must(pools, size, strategy, shape):
    length, batch, _, kv_heads, _, _, padded = shape
    counts = pools(size).run("compare", *shape, False, strategy)
    lengths = plan_of(length, size, padded).lengths
    token = 2 * batch * kv_heads * DIM
    for rank, found in enumerate(counts):
        if size == 1:
            assert found == (0, 0, 0, 0)
        elif strategy == "ring":
            # its own shard, and those of the ranks before as they come by, but for that of the next rank
            passed = sum(lengths) - lengths[(rank + 1) % size]
            carried = sum(lengths) - lengths[rank]
            assert found == (size - 1, token * passed, 2 * (size - 1), token * (passed + carried))
        else:
            others = sum(lengths) - lengths[rank]
            assert found == (1, token * max(lengths) * (size - 1), 1, token * others)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ulysses_times_ring_matches_and_sends_less_than_either(pools, shape):
    counts = pools(4).run("compare", *shape, False, "usp")
    length, batch, heads, kv_heads, _, _, padded = shape
    if (heads, kv_heads) == (4, 4):
        lengths = plan_of(length, 4, padded).lengths
        for rank, found in enumerate(counts):
            near, other = lengths[2 * (rank // 2) :][:2], lengths[2 * (1 - rank // 2) :][:2]
            own, peer = near[rank % 2], near[1 - rank % 2]
            half = batch * DIM * heads // 2
            assert found == (
                3,
                half * (3 * own + peer + 2 * sum(near)),
                4,
                half * (3 * peer + own + 2 * sum(near + other)),
            )


def test_ulysses_times_ring_runs_on_two_ranks_that_only_exchange_heads(pools):
    pools(2).run("compare", 9, 2, 4, 2, 3, True, True, False, "usp")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("strategy", ACROSS)
def test_causal_matches(pools, size, strategy):
    pools(size).run("compare", 9, 2, 4, 2, 0, True, True, True, strategy)


def test_causal_ulysses_times_ring_matches(pools):
    pools(4).run("compare", 9, 2, 4, 2, 0, True, False, True, "usp")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from([2, 4]), st.sampled_from(ACROSS), st.data())
def test_any_shards_match(pools, size, strategy, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size).filter(any))
    rows = [length + data.draw(st.integers(0, 2)) for length in lengths]
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    text = data.draw(st.integers(0, 3))
    causal = data.draw(st.booleans()) if not text else False
    pools(size).run("any_shards", tuple(lengths), tuple(rows), kv_heads * group, kv_heads, text, strategy, causal)


@pytest.mark.parametrize("scale", [0.0, -0.4, 1.7])
def test_a_scale_of_any_sign_matches(pools, scale):
    pools(2).run("scaled", scale)
