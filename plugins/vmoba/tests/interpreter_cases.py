"""The kernels in Triton's interpreter, on the CPU. Run by test_kernels.py in a process of its own."""

import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_kernels.py"

# The interpreter is chosen by the variable above, before triton is imported.
# ruff: noqa: E402

from attnmux.testing import (
    assert_close_to_oracle,
    dense_attention_baseline,
    dense_attention_oracle,
    make_inputs,
    measure_error,
    poisoned_memory,
)
from attnmux_blocksparse.kernels import backward as block_sparse_backward
from attnmux_blocksparse.kernels import forward as block_sparse_forward
from attnmux_blocksparse.kernels.configs import BackwardConfig, ForwardConfig
from attnmux_vmoba import reference
from attnmux_vmoba.kernels import attend, launch, sort
from attnmux_vmoba.kernels.select import launch_select
from attnmux_vmoba.prepare import Selection, from_chunk_order, resolve_chunks, to_chunk_order, unpack_bits

# name: (grid, chunk size, topk, heads, key heads, head size, layout, dtype)
CASES = {
    "temporal_in_place": ((3, 8, 16), 1, 2, 2, 2, 16, "contiguous", torch.float32),
    "temporal_short_last": ((3, 8, 12), 0.7, 3, 2, 2, 16, "contiguous", torch.float32),
    "temporal_short_last_in_place": ((1, 1, 150), 64 / 150, 2, 2, 2, 16, "contiguous", torch.float32),
    "spatial": ((2, 8, 12), (4, 4), 2, 2, 1, 16, "contiguous", torch.float32),
    "spatial_whole_blocks": ((4, 8, 8), (4, 4), 3, 2, 1, 16, "packed", torch.float32),
    "st": ((4, 6, 8), (2, 3, 4), 3, 2, 2, 48, "heads_first", torch.float32),
    "st_many": ((4, 6, 8), (2, 2, 2), 3, 1, 1, 16, "contiguous", torch.float16),
    "one_chunk": ((2, 4, 4), 2, 4, 1, 1, 16, "contiguous", torch.float32),
    "one_token": ((1, 1, 1), 1, 1, 1, 1, 16, "contiguous", torch.float32),
    "all_chunks": ((2, 4, 8), (1, 2, 4), 99, 1, 1, 16, "contiguous", torch.float32),
    "own_alone": ((2, 4, 8), (1, 2, 4), 1, 1, 1, 16, "contiguous", torch.float32),
}


# The others have one sample: the interpreter is slow.
TWO_SAMPLES = ("spatial", "own_alone", "temporal_short_last_in_place")


def make(name):
    grid, chunk_size, topk, heads, heads_kv, D, layout, dtype = CASES[name]
    chunks = resolve_chunks(grid, chunk_size)
    inputs = make_inputs(
        batch=1 + (name in TWO_SAMPLES), length_q=chunks.length, length_k=chunks.length,
        num_heads=heads, num_kv_heads=heads_kv, head_size=D,
        dtype=dtype, device="cpu", input_scale=1.0, layout=layout, seed=len(name),
    )  # fmt: skip
    return *inputs, chunks, Selection(topk=topk)


@pytest.fixture(autouse=True)
def operator_in_the_interpreter(monkeypatch):
    """The operator's plain kernels, called without a device."""

    def attend_rows(parts, k, v, index, scale, engine=None):
        rows = parts.transpose(0, 1)[None]
        lse = torch.full((1, *parts.shape[:2]), float("nan"))
        config = ForwardConfig(128, 64, 4, 2)
        block_sparse_forward.launch_forward(rows, k, v, rows, lse, index, softmax_scale=scale, config=config)
        return lse[0]

    def differentiate(parts, dout, lse2, delta, k, v, dk, dv, index, scale, engine=None):
        rows, do = parts.transpose(0, 1)[None], dout.transpose(0, 1)[None]
        stats, config = (lse2[None], delta[None]), BackwardConfig(64, 64, 4, 2)
        block_sparse_backward.launch_dkdv(rows, k, v, do, *stats, dk, dv, index, softmax_scale=scale, config=config)
        block_sparse_backward.launch_dq(rows, k, v, do, *stats, rows, index, softmax_scale=scale, config=config)

    monkeypatch.setattr(launch, "run_operator", attend_rows)
    monkeypatch.setattr(launch, "differentiate_operator", differentiate)


@pytest.mark.parametrize("name", ["temporal_short_last", "spatial", "st", "st_many", "one_token", "own_alone"])
@pytest.mark.parametrize(
    "how", [Selection(), Selection("threshold", threshold=0.3), Selection("threshold", threshold=1.0)]
)
def test_choice_is_that_of_the_reference(name, how):
    q, k, _, chunks, topk = make(name)
    how = topk if how.mode == "topk" else how
    with poisoned_memory():
        words = launch_select(q, k, chunks, how)
    assert torch.equal(words, reference.select_bits(q.double(), k.double(), chunks, how))


@pytest.mark.parametrize("keeps_one", [False, True])
def test_quirk_keeps_one_more(keeps_one):
    q, k, _, chunks, _ = make("st")
    how = Selection("threshold", threshold=0.0, keeps_one=keeps_one)
    words = launch_select(q, k, chunks, how)
    assert torch.equal(words, reference.select_bits(q, k, chunks, how))
    assert (unpack_bits(words, chunks.num_chunks).sum(2) == 1 + keeps_one).all()


@pytest.mark.parametrize("how", [Selection(topk=3), Selection("threshold", threshold=0.3)])
def test_equal_gates_go_to_the_lower_chunk(how):
    _, _, _, chunks, _ = make("st_many")
    generator = torch.Generator().manual_seed(0)
    # small whole numbers: sums are exact, many gates are equal
    q = torch.randint(-1, 2, (1, chunks.length, 1, 16), generator=generator).float()
    k = torch.randint(0, 2, (1, chunks.num_chunks, 1, 16), generator=generator).float()
    k = k.repeat_interleave(chunks.chunk_tokens, 1)
    k = from_chunk_order(k, chunks)
    assert torch.equal(launch_select(q, k, chunks, how), reference.select_bits(q, k, chunks, how))
    assert torch.equal(launch_select(q * 0, k, chunks, how), reference.select_bits(q * 0, k, chunks, how))


@pytest.mark.parametrize("how", [Selection(topk=2), Selection("threshold", threshold=0.3)])
def test_nan_is_kept(how):
    q, k, _, chunks, _ = make("st")
    q, k = q.clone(), k.clone()
    k[0, 5, 0] = float("nan")
    q[0, 7, 1] = float("nan")
    assert torch.equal(launch_select(q, k, chunks, how), reference.select_bits(q, k, chunks, how))


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_sorted_by_chunk_and_token(name):
    q, k, _, chunks, how = make(name)
    topk = min(how.topk, chunks.num_chunks)
    words = reference.select_bits(q, k, chunks, how)
    chosen = unpack_bits(words, chunks.num_chunks)
    with poisoned_memory():
        pairs = sort.sort_pairs(words, chunks, topk)
        lists, counts = sort.tile_lists(pairs, 3, 2)
        offsets, entries, order = sort.transposed_lists(pairs, 3, 2)
    assert torch.equal(pairs.sizes[:, :, :, 0], chosen.sum(-1).int().expand(2, -1, -1, -1))
    assert (pairs.walks == 0).all()
    assert torch.equal(pairs.raster, from_chunk_order_place(chunks))
    for b in range(chosen.shape[0]):
        for h in range(chosen.shape[1]):
            row, chunk_of_tile = 0, []
            for c in range(chunks.num_chunks):
                tokens = chosen[b, h, c].nonzero()[:, 0].tolist()
                assert pairs.starts[b, h, 0, c] == row
                for i, token in enumerate(tokens):
                    slot = int(chosen[b, h, :c, token].sum())
                    assert pairs.rows[b, h, 0, pairs.firsts[b, h, 0, token] + slot] == row + i
                    assert pairs.order[b, h, 0, row + i] == pairs.raster[token]
                tiles = -(-len(tokens) // sort.TILE)
                chunk_of_tile += [c] * tiles
                row += tiles * sort.TILE
            assert len(chunk_of_tile) <= pairs.tiles
            last = chunks.num_chunks - 1
            expected = [[3 * c + i for i in range(2 if c == last else 3)] for c in chunk_of_tile]
            found = [row[:n].tolist() for row, n in zip(lists[b, h], counts[b, h], strict=True)]
            assert found == expected + [[]] * (pairs.tiles - len(expected))
            blocks = 3 * last + 2
            for j in range(blocks):
                want = [t for t, c in enumerate(chunk_of_tile) if c == j // 3]
                assert entries[b, h, offsets[b, h, j] : offsets[b, h, j + 1]].tolist() == want
            assert sorted(order[b, h].tolist()) == list(range(blocks))
            lengths = offsets[b, h].diff()[order[b, h]]
            assert (lengths.diff() <= 0).all()


def from_chunk_order_place(chunks):
    """Raster position of every token in chunk order."""
    return to_chunk_order(torch.arange(chunks.length)[None], chunks)[0].int()


def check(q, k, v, words, chunks, topk, forward, backward, scale=0.3):
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(q.dtype)
    with poisoned_memory():
        out, lse = forward(q, k, v, words, chunks, topk, scale)
        grads = backward(dout, q, k, v, out, lse, words, chunks, topk, scale)
    exact = [x.double() for x in (q, k, v)]
    truth, truth_lse = reference.attention_forward(*exact, words, chunks, scale)
    truths = reference.attention_backward(dout.double(), *exact, truth, truth_lse, words, chunks, scale)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    dense = dense_attention_baseline(*leaves, softmax_scale=scale)
    dense_exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    dense_truth = dense_attention_oracle(*dense_exact, softmax_scale=scale)
    assert_close_to_oracle(out, truth, measure_error(dense, dense_truth))
    assert_close_to_oracle(lse.float(), truth_lse, truth_lse.float(), what="lse")
    errors = [
        measure_error(x, y)
        for x, y in zip(
            torch.autograd.grad(dense, leaves, dout),
            torch.autograd.grad(dense_truth, dense_exact, dout.double()),
            strict=True,
        )
    ]
    for what, x, y, error in zip("qkv", grads, truths, errors, strict=True):
        size = float(dout.double().square().mean().sqrt() * v.double().square().mean().sqrt())
        assert_close_to_oracle(x, y, error, kind="gradient", what=f"gradient of {what}", term_size=size)


@pytest.mark.parametrize("name", ["temporal_in_place", "temporal_short_last", "spatial", "one_token", "own_alone"])
def test_gathered_attention_agrees_with_the_reference(name):
    q, k, v, chunks, how = make(name)
    words = reference.select_bits(q, k, chunks, how)
    topk = min(how.topk, chunks.num_chunks)
    check(q, k, v, words, chunks, topk, launch._gathered_forward, launch._gathered_backward)


@pytest.mark.parametrize("name", CASES)
def test_indexed_attention_agrees_with_the_reference(name):
    q, k, v, chunks, how = make(name)
    words = reference.select_bits(q, k, chunks, how)
    topk = min(how.topk, chunks.num_chunks)
    check(q, k, v, words, chunks, topk, launch._indexed_forward, launch._indexed_backward)


@pytest.fixture
def found_pairs(monkeypatch):
    """What was sorted, call by call."""
    found = []
    sort_pairs = sort.sort_pairs
    monkeypatch.setattr(sort, "sort_pairs", lambda *x, **y: found.append(sort_pairs(*x, **y)) or found[-1])
    return found


def which_are_walked(pairs, chunks):
    """Of the ranges that hold tokens: "none", "some" or "all"."""
    share = float((pairs.walks[:, :, : -(-chunks.length // sort.TILE)] > 0).float().mean())
    return {0.0: "none", 1.0: "all"}.get(share, "some")


@pytest.mark.parametrize(("name", "threshold", "share", "least_kept", "walked"), [
    ("st_many", 0.35, 1e9, 99, "none"), ("st", 0.35, 0.0, 99, "none"), ("temporal_short_last", 0.6, 0.0, 1, "some"),
    ("spatial", 0.6, 1e9, 1, "some"), ("st", 1.0, 1e9, 1, "all"),
])  # fmt: skip
def test_queries_may_keep_different_numbers_of_chunks(
    name, threshold, share, least_kept, walked, monkeypatch, found_pairs
):
    """Heads of one unit (share 1e9) and of several, and ranges without room for their pairs, included."""
    q, k, v, chunks, _ = make(name)
    words = reference.select_bits(q, k, chunks, Selection("threshold", threshold=threshold))
    for variable, value in (
        ("LEAST_KEPT", least_kept), ("LEAST_UNIT", 64), ("FORWARD_SHARE", share), ("BACKWARD_SHARE", share),
        ("FORWARD_WASTE", 0.0), ("BACKWARD_WASTE", 0.0),
    ):  # fmt: skip
        monkeypatch.setattr(launch, variable, value)
    check(q, k, v, words, chunks, 0, launch._indexed_forward, launch._indexed_backward)
    assert (found_pairs[0].per_head > 1) == (share == 0.0)
    assert [which_are_walked(pairs, chunks) for pairs in found_pairs] == [walked, walked]


@pytest.mark.parametrize(("least_kept", "walked"), [(99, "none"), (1, "some")])
def test_gathered_queries_may_keep_different_numbers_of_chunks(least_kept, walked, monkeypatch, found_pairs):
    q, k, v, chunks, _ = make("temporal_short_last")
    words = reference.select_bits(q, k, chunks, Selection("threshold", threshold=0.6))
    monkeypatch.setattr(launch, "LEAST_KEPT", least_kept)
    check(q, k, v, words, chunks, 0, launch._gathered_forward, launch._gathered_backward)
    assert [which_are_walked(pairs, chunks) for pairs in found_pairs] == ["none", walked]


@pytest.mark.parametrize(("name", "threshold", "walked"), [
    ("temporal_short_last", None, "some"), ("temporal_short_last", 0.4, "all"), ("temporal_short_last_in_place", 0.4, "some"),
    ("spatial", None, "some"), ("spatial", 0.4, "some"), ("st", None, "all"), ("st", 0.4, "some"), ("st_many", None, "some"),
])  # fmt: skip
def test_walked_ranges_agree_with_the_reference(name, threshold, walked, monkeypatch, found_pairs):
    """Every second range of 128 queries agrees but for two of them; then those that do not agree are walked too."""
    q, k, v, chunks, how = make(name)
    in_order = to_chunk_order(q, chunks).clone()
    for first in range(0, chunks.length, 2 * sort.TILE):
        in_order[:, first + 2 : first + sort.TILE] = in_order[:, first : first + 1]
    q = from_chunk_order(in_order, chunks)
    how = how if threshold is None else Selection("threshold", threshold=threshold)
    words = reference.select_bits(q, k, chunks, how)
    by_range = [x.sum(3) for x in unpack_bits(words, chunks.num_chunks).split(sort.TILE, 3)]
    wastes = [((x > 0).sum(2) * sort.TILE / x.sum(2)) for x in by_range]
    middle = (float(min(x.min() for x in wastes)) + float(max(x.max() for x in wastes))) / 2
    for variable in ("FORWARD_WASTE", "BACKWARD_WASTE"):
        monkeypatch.setattr(launch, variable, middle if walked == "some" else 1e9)
    topk = min(how.topk, chunks.num_chunks) if threshold is None else 0
    check(q, k, v, words, chunks, topk, launch._indexed_forward, launch._indexed_backward)
    assert [which_are_walked(pairs, chunks) for pairs in found_pairs] == [walked, walked]


@pytest.mark.parametrize("waste", [0.0, 1e9])
@pytest.mark.parametrize(("scale", "is_wide"), [(-0.3, False), (0.0, False), (0.3, True)])
def test_odd_scales_and_wide_offsets(waste, scale, is_wide, monkeypatch):
    q, k, v, chunks, how = make("temporal_short_last_in_place")
    words = reference.select_bits(q, k, chunks, how)
    for name, value in (("FORWARD_WASTE", waste), ("BACKWARD_WASTE", waste)):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(attend, "is_wide", lambda *_: is_wide)
    check(q, k, v, words, chunks, how.topk, launch._indexed_forward, launch._indexed_backward, scale)


@pytest.mark.parametrize("path", ["gathered", "indexed"])
def test_slices_of_heads_give_the_same_bits(path, monkeypatch):
    forward, backward = (getattr(launch, f"_{path}_{direction}") for direction in ("forward", "backward"))
    q, k, v, chunks, how = make("spatial_whole_blocks")
    words = reference.select_bits(q, k, chunks, how)
    dout = torch.randn_like(q)

    def run(share, forward, backward):
        monkeypatch.setattr(launch, "FORWARD_SHARE", share)
        monkeypatch.setattr(launch, "BACKWARD_SHARE", share)
        out, lse = forward(q, k, v, words, chunks, how.topk, 0.3)
        return out, lse, *backward(dout, q, k, v, out, lse, words, chunks, how.topk, 0.3)

    # heads one by one, then all at once
    for x, y in zip(run(0.0, forward, backward), run(1e9, forward, backward), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("heads", "group", "fitting", "whole_groups", "expected"), [
    (12, 1, 5.5, False, 4), (12, 1, 0.3, False, 1), (12, 1, 99.0, True, 12), (10, 1, 4.0, False, 4),
    (12, 4, 3.0, False, 2), (12, 4, 1.0, True, 4), (12, 4, 9.0, False, 8),
])  # fmt: skip
def test_slices_are_as_few_as_fit(heads, group, fitting, whole_groups, expected):
    assert launch.heads_per_slice(heads, group, 1, 0, fitting, whole_groups) == expected


@pytest.mark.parametrize(("topk", "fits"), [(3, True), (0, False)])
def test_operator_runs_where_all_that_a_head_may_keep_fits(topk, fits):
    """At the shape of the benchmark: with thresholds a head may keep all 16 chunks, which leaves no memory for a second head."""
    q = torch.empty(1, 30720, 12, 128, dtype=torch.bfloat16, device="meta")
    chunks = resolve_chunks((20, 48, 32), (12, 8))
    budget = launch._budget(q, q, launch.FORWARD_SHARE * 2)
    assert launch.takes_operator(q, chunks, topk or chunks.num_chunks, budget) is fits
