"""Plans cover every token and head once, in numbers alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnmux import UnsupportedRequestError
from attnmux.distributed import SeqPlan
from attnmux.distributed.plan import HeadPlan


@given(st.integers(1, 500), st.integers(1, 64))
def test_balanced_shards_cover_the_sequence_and_differ_by_at_most_one(length, size):
    plan = SeqPlan.balanced(length, size)
    assert plan.length == length and len(plan.lengths) == size
    assert max(plan.lengths) - min(plan.lengths) <= 1
    assert [token for rank in range(size) for token in range(*plan.range_of(rank))] == list(range(length))


@given(st.integers(1, 64), st.integers(1, 16), st.data())
def test_padding_lies_behind_the_tokens(rows, size, data):
    length = data.draw(st.integers(1, rows * size))
    plan = SeqPlan.padded(length, rows, size)
    held = [rank * rows + row for rank in range(size) for row in range(plan.lengths[rank])]
    assert held == list(range(length))


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 40))
def test_every_query_head_is_on_one_rank_with_its_key_head(kv_heads, group, size):
    plan = HeadPlan.of(kv_heads * group, kv_heads, size)
    assert len(plan.q) == len(plan.kv) == size
    assert [head for first, last in plan.q for head in range(first, last)] == list(range(kv_heads * group))
    for (q_first, q_last), (kv_first, kv_last) in zip(plan.q, plan.kv, strict=True):
        if q_first == q_last:
            assert kv_first == kv_last
            continue
        local_group, rest = divmod(q_last - q_first, kv_last - kv_first)
        assert rest == 0
        assert all((q_first + i) // group == kv_first + i // local_group for i in range(q_last - q_first))


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_does_not_fit_is_refused(length):
    with pytest.raises(UnsupportedRequestError, match=rf"original_seq_len={length} must be in \[1, 8\]"):
        SeqPlan.padded(length, 4, 2)
