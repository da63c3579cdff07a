"""Layers over several ranks against LocalAttention on the whole sequence, in float64, on ranks that talk over gloo."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmux import SeqPlan
from attnmux.distributed.plan import HeadPlan

DIM = 8
# tokens, batch, query heads, key heads, text tokens, rotary, padded: dimensions are paired, not multiplied
SHAPES = [
    (8, 1, 4, 4, 0, False, False),
    (9, 2, 4, 4, 0, True, False),
    (7, 2, 6, 3, 1, True, True),
    (9, 1, 6, 2, 7, True, True),
    (3, 2, 5, 5, 7, False, False),
    (2, 1, 5, 1, 1, True, True),
    (9, 2, 1, 1, 0, True, False),
    (5, 2, 4, 1, 7, False, True),
    (5, 1, 8, 2, 1, True, False),
    (6, 2, 1, 1, 3, False, True),
]


@pytest.mark.parametrize(
    ("size", "how"), [(1, ()), (2, ()), (4, ()), (2, ("direct_jobs.run",)), (4, ("direct_jobs.run",))]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_whole_sequence(pools, size, how, shape):
    length, batch, heads, kv_heads, text, _, padded = shape
    counts = pools(size).run(*how, "compare", *shape)
    plan = SeqPlan.padded(length, -(-length // size) + 1, size) if padded else SeqPlan.balanced(length, size)
    of = HeadPlan.of(heads, kv_heads, size)
    width = [last - first for first, last in of.q]
    both = [q + 2 * (kv[1] - kv[0]) for q, kv in zip(width, of.kv, strict=True)]
    for rank, found in enumerate(counts):
        if size == 1:
            assert found == (0, 0, 0, 0)
            continue
        others = [peer for peer in range(size) if peer != rank]
        to = plan.lengths[rank] * batch * DIM * sum(both[peer] for peer in others)
        back = sum(plan.lengths[peer] + text for peer in others) * batch * DIM * width[rank]
        to_backward = sum(plan.lengths[peer] for peer in others) * batch * DIM * both[rank]
        back_backward = (plan.lengths[rank] + text) * batch * DIM * sum(width[peer] for peer in others)
        assert found == (2, to + back, 2, to_backward + back_backward)


@pytest.mark.parametrize("size", [2, 4])
def test_sends_four_local_tensors_less_its_own_part(pools, size):
    local = 8 // size * 1 * 4 * DIM
    for found in pools(size).run("compare", 8, 1, 4, 4, 0, False, False):
        assert found[:2] == (2, 4 * local * (size - 1) // size)


@pytest.mark.parametrize(("size", "overlap"), [(2, 2), (2, 3), (4, 2)])
@pytest.mark.parametrize(
    "shape",
    [
        (9, 2, 8, 8, 0, True, False),
        (7, 2, 12, 6, 1, True, True),
        (9, 1, 5, 5, 7, False, False),
        (2, 1, 7, 7, 1, True, True),
    ],
    ids=str,
)
def test_groups_of_heads_give_the_same_bits_and_send_as_much(pools, size, overlap, shape):
    for plain, found in pools(size).run("overlap_jobs.overlapped", shape, overlap):
        collectives, sent, collectives_backward, sent_backward = plain
        assert found == (overlap * collectives, sent, overlap * collectives_backward, sent_backward)


def test_groups_of_heads_match_the_whole_sequence(pools):
    pools(2).run("compare", 9, 2, 6, 3, 2, True, True, False, "ulysses", 2)


def passes(there, back, groups):
    # all leave before the first is waited for, and each goes back before the next is; a single one is there at once
    waits = [f"wait {there}"] if len(groups) > 1 else []
    between = [step for group in groups for step in (*waits, f"send {back} {group}")]
    return [f"send {there} {group}" for group in groups] + between + [f"wait {back}"] * len(groups)


def order_of(overlap):
    forward = passes("to_heads", "to_shards", range(overlap))
    return forward, passes("to_shards backward", "to_heads backward", range(overlap)[::-1])


@pytest.mark.parametrize("overlap", [1, 2])
def test_the_next_group_of_heads_is_under_way_while_one_is_attended_to_backward_too(pools, overlap):
    assert pools(2).run("overlap_jobs.order", overlap) == [order_of(overlap)] * 2


def test_causal_matches(pools):
    pools(2).run("compare", 9, 1, 4, 2, 0, True, True, True)


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "usp", "allgather_kv"])
def test_one_rank_gives_the_bits_of_local_attention_by_the_same_operations(pools, strategy):
    pools(1).run("one_rank", strategy)


@pytest.mark.parametrize("how", [(), ("direct_jobs.run",)])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from([2, 4]), st.data())
def test_every_exchange_brings_the_right_heads_and_its_inverse_the_tokens(pools, how, size, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size).filter(any))
    rows = [length + data.draw(st.integers(0, 2)) for length in lengths]
    kv_heads, group = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    batch, text = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 3))
    groups = data.draw(st.integers(1, -(-kv_heads // size)))
    of_call = tuple(lengths), tuple(rows), batch, kv_heads * group, kv_heads, text, groups
    pools(size).run(*how, "there_and_back", *of_call)


def test_operators_pass_torchs_own_checks(pools):
    pools(2).run("operators")


def test_compiles_without_graph_breaks_at_one_rank(pools):
    pools(1).run("compiled")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_mean_of_a_parameters_gradients_is_the_gradient_of_the_mean(pools, size):
    pools(size).run("parameter")


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather_kv"])
def test_one_gradient_alone_is_the_same_and_inference_mode_runs(pools, strategy):
    pools(2).run("gradient_of_one", strategy)


SIZES = [(1, 1), (2, 1), (4, 1), (2, 2)]
"""Ranks and groups of heads; rank 0 of two has two heads of four."""


@pytest.mark.parametrize(("size", "overlap"), SIZES)
@pytest.mark.parametrize("gated", [True, False])
def test_video_sparse_attention_gives_the_same_bits_on_any_number_of_ranks(pools, size, overlap, gated):
    pytest.importorskip("attnmux_vsa")
    counts = pools(size).run("video_sparse", gated, overlap)
    if size == 1:
        assert counts == [(0, 0)]
        return
    rows, heads = 7 * 5 * 3, 4
    own = heads // size
    for length, found in zip(SeqPlan.balanced(rows, size).lengths, counts, strict=True):
        tensors = 4 if gated else 3
        sent = length * DIM * (heads - own) * tensors + (rows - length) * DIM * own
        assert found == (2 * overlap, sent)


@pytest.mark.parametrize(("size", "overlap"), SIZES)
def test_sparse_linear_attention_and_its_projection_match(pools, size, overlap):
    pytest.importorskip("attnmux_sla")
    pools(size).run("sparse_linear", overlap)


@pytest.mark.parametrize("backend", ["SAGE_ATTN", "SAGE_SLA_ATTN"])
@pytest.mark.parametrize(("size", "overlap"), SIZES)
def test_quantised_attention_gives_the_same_bits_on_any_number_of_ranks(pools, size, overlap, backend):
    pytest.importorskip("attnmux_sage")
    pools(size).run("quantised", backend, overlap)


@pytest.mark.parametrize(("size", "overlap"), SIZES)
def test_mixture_of_blocks_matches_where_heads_choose_alone_and_is_refused_where_not(pools, size, overlap):
    pytest.importorskip("attnmux_vmoba")
    assert pools(size).run("mixture_of_blocks", "query_head", overlap) == [None] * size
    for message in pools(size).run("mixture_of_blocks", "overall", overlap):
        assert message is None if size == 1 else f"query has {4 // size // overlap} of the layer's 4 heads" in message


@pytest.mark.parametrize(("size", "overlap"), SIZES)
@pytest.mark.parametrize(("shared", "text"), [(False, 0), (True, 5), (False, 20)])
def test_block_sparse_attention_takes_the_lists_of_all_heads(pools, size, overlap, shared, text):
    pytest.importorskip("attnmux_blocksparse")
    for message in pools(size).run("listed_blocks", shared, text, overlap):
        assert "for 2 heads; this rank has heads" in message if size > 1 else "2 heads; needed: 1 or 2, and 1 or 6"


def test_groups_come_from_a_mesh_a_default_and_a_scope(pools):
    pools(4).run("groups")
