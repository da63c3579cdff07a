"""The plain Triton kernels in Triton's interpreter, on the CPU. Run by test_kernels.py in a process of its own."""

import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_kernels.py"

# The interpreter is chosen by the variable above, before triton is imported.
# ruff: noqa: E402
from blocksparse_scenarios import Scenario, assert_call_is_right, make_tensors
from raster_scenarios import make_raster

from attnmux_blocksparse import BlockIndex, prepare, reference
from attnmux_blocksparse.kernels import backward, forward, select
from attnmux_blocksparse.kernels.arguments import IndexTensors
from attnmux_blocksparse.kernels.configs import BackwardConfig, ForwardConfig
from attnmux_blocksparse.kernels.select import launch_select
from attnmux_blocksparse.kernels.transpose import launch_transpose

BASE = Scenario(batch=1, len_q=128, len_k=128)
CASES = {
    "full_blocks": BASE,
    "odd_lengths": BASE.but(len_q=127, len_k=65),
    "one_token": BASE.but(len_q=1, len_k=1),
    "cross_lengths": BASE.but(len_q=65, len_k=190),
    "gqa": BASE.but(heads=4, heads_k=2, batch=2),
    "empty_rows": BASE.but(empty_rows=True),
    "partial_blocks": BASE.but(partial=True, batch=2),
    "partial_blocks_finite": BASE.but(partial=True, finite_padding=True),
    "partial_odd_lengths": BASE.but(partial=True, len_q=100, len_k=180),
    "heads_first": BASE.but(layout="bhsd", batch=2),
    "packed": BASE.but(layout="packed"),
    "shared_lists": BASE.but(shared=True, batch=2),
    "head_dim_48": BASE.but(head_dim=48),
    "blocks_128x64": BASE.but(block_q=128, len_q=200),
    "blocks_64x256": BASE.but(block_k=256, len_k=300),
    "blocks_256x128": BASE.but(block_q=256, block_k=128, len_q=300, len_k=130),
    "negative_scale": BASE.but(softmax_scale=-0.3),
    "zero_scale": BASE.but(softmax_scale=0.0),
    "large_inputs": BASE.but(magnitude=16.0, dtype=torch.float16),
    "float16": BASE.but(dtype=torch.float16),
    "float16_partial_gqa": BASE.but(dtype=torch.float16, partial=True, heads=2, heads_k=1),
}


def run_kernels(q, k, v, dout, index, scale, tma=False, dlse=None):
    """Forward and backward on poisoned outputs."""
    lists = index.transpose()
    tensors = IndexTensors(
        index.blocks,
        index.counts,
        index.block_q,
        index.block_k,
        index.q_lengths,
        index.k_lengths,
        index.finite_padding,
        False,
        *lists,
    )

    def poison(shape, dtype):
        return torch.full(shape, float("nan"), dtype=dtype)

    out = poison(q.shape, q.dtype)
    lse = poison((q.shape[0], q.shape[2], q.shape[1]), torch.float32)
    forward.launch_forward(q, k, v, out, lse, tensors, softmax_scale=scale, config=ForwardConfig(128, 64, 4, 2, tma))
    lse2, delta = backward.launch_stats(out, dout, lse, dlse)
    dq, dk, dv = (poison(x.shape, x.dtype) for x in (q, k, v))
    config = BackwardConfig(64, 64, 4, 2, tma)
    backward.launch_dkdv(q, k, v, dout, lse2, delta, dk, dv, tensors, softmax_scale=scale, config=config)
    backward.launch_dq(q, k, v, dout, lse2, delta, dq, tensors, softmax_scale=scale, config=config)
    return out, lse, (dq, dk, dv)


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_oracle(name):
    scenario = CASES[name]
    q, k, v, dout, index = make_tensors(scenario, seed=len(name))
    out, lse, grads = run_kernels(q, k, v, dout, index, scenario.scale)
    assert_call_is_right(q, k, v, dout, index, scenario.scale, out, lse, grads)


@pytest.mark.parametrize("name", ["odd_lengths", "gqa", "partial_blocks", "partial_blocks_finite", "heads_first"])
def test_tma_kernels_agree_with_the_oracle(name):
    scenario = CASES[name]
    q, k, v, dout, index = make_tensors(scenario, seed=3)
    out, lse, grads = run_kernels(q, k, v, dout, index, scenario.scale, tma=True)
    assert_call_is_right(q, k, v, dout, index, scenario.scale, out, lse, grads)


def test_small_tiles_walk_the_same_blocks():
    """Tiles below the block size, as cards with little shared memory and large heads use them."""
    scenario = BASE.but(block_q=128, block_k=128, len_q=150, len_k=200, partial=True)
    q, k, v, dout, index = make_tensors(scenario)
    tensors = IndexTensors(
        index.blocks, index.counts, 128, 128, index.q_lengths, index.k_lengths, False, False, *index.transpose()
    )
    out, lse = torch.full(q.shape, float("nan")), torch.full((1, 2, 150), float("nan"))
    forward.launch_forward(q, k, v, out, lse, tensors, softmax_scale=0.25, config=ForwardConfig(64, 32, 4, 2))
    lse2, delta = backward.launch_stats(out, dout, lse, None)
    dq, dk, dv = (torch.full(x.shape, float("nan")) for x in (q, k, v))
    config = BackwardConfig(32, 32, 4, 1)
    backward.launch_dkdv(q, k, v, dout, lse2, delta, dk, dv, tensors, softmax_scale=0.25, config=config)
    backward.launch_dq(q, k, v, dout, lse2, delta, dq, tensors, softmax_scale=0.25, config=config)
    assert_call_is_right(q, k, v, dout, index, 0.25, out, lse, (dq, dk, dv))


def test_gradient_of_the_lse_is_part_of_the_backward():
    q, k, v, dout, index = make_tensors(BASE)
    dlse = torch.randn(1, 2, 128)
    _, _, grads = run_kernels(q, k, v, dout, index, BASE.scale, dlse=dlse)
    from blocksparse_scenarios import oracle

    exact = oracle(q, k, v, dout, index, BASE.scale, dlse)[2:]
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_hot_blocks_first_covers_every_key_block():
    """A sink chosen by every query block moves to the front of the order; nothing is lost."""
    scenario = BASE.but(len_q=640, len_k=1280, keep=0.05)
    q, k, v, dout, index = make_tensors(scenario)
    mask = index.to_block_mask()
    mask[..., 17] = True
    index = BlockIndex.from_block_mask(mask, block_q=64, block_k=64)
    assert (index.transpose().order[..., 0] != 0).any()
    out, lse, grads = run_kernels(q, k, v, dout, index, scenario.scale)
    assert_call_is_right(q, k, v, dout, index, scenario.scale, out, lse, grads)


def test_kernels_follow_the_lists_of_some_heads_in_the_memory_of_all():
    scenario = BASE.but(heads=4, heads_k=4, batch=2, len_k=190)
    tensors = make_tensors(scenario, seed=8)
    q, k, v, dout = (x[:, :, 1:3] for x in tensors[:4])
    index = tensors[4].of_heads(1, 3)
    lists = launch_transpose(index.blocks, index.counts, index.num_key_blocks)
    offsets, entries = prepare.transpose_lists(index.blocks, index.counts, index.num_key_blocks)
    assert torch.equal(lists[0], offsets)
    filled = torch.arange(entries.shape[-1]) < offsets[..., -1:]
    assert torch.equal(lists[1][filled], entries[filled])
    out, lse, grads = run_kernels(q, k, v, dout, index, scenario.scale)
    assert_call_is_right(q, k, v, dout, index, scenario.scale, out, lse, grads)


@pytest.mark.parametrize(
    ("shape", "keep"),
    [
        ((1, 1, 1, 1), 1.0),
        ((2, 3, 17, 33), 0.3),
        ((1, 2, 40, 300), 0.95),
        ((1, 1, 5, 1100), 0.5),
        ((1, 2, 600, 7), 0.1),
    ],
)
def test_transposed_lists_are_those_of_the_sort(shape, keep):
    """More rows than a chunk, more chunks and keys than a tile, lists longer than a tile, empty rows, a hot key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < keep
    mask[..., shape[-1] // 2] = True
    mask[:, :, 0] = False
    index = BlockIndex.from_block_mask(mask, block_q=64, block_k=64)
    blocks, counts = index.blocks, index.counts
    offsets, entries = prepare.transpose_lists(blocks, counts, shape[-1])
    got = launch_transpose(blocks, counts, shape[-1])
    assert torch.equal(got[0], offsets)
    assert torch.equal(got[2], prepare.hot_first_order(offsets))
    for place in torch.cartesian_prod(*(torch.arange(n) for n in offsets.shape[:2])).tolist():
        used = int(offsets[tuple(place)][-1])
        assert torch.equal(got[1][tuple(place)][:used], entries[tuple(place)][:used])
    assert int(got[1].min()) >= 0
    assert int(got[1].max()) < shape[2]


@pytest.mark.parametrize(
    ("n_q", "n_k", "topk", "protected", "order"),
    [(1, 1, 1, 0, 1.0), (33, 70, 9, 2, 1.0), (17, 130, 130, 0, -1.0), (5, 40, 3, 3, 0.0), (20, 300, 31, 0, 1.0)],
)
def test_selection_is_that_of_the_sort(n_q, n_k, topk, protected, order):
    """More rows and columns than a tile, everything kept, all scores equal; ties, zeros of both signs and NaN among the scores."""
    generator = torch.Generator().manual_seed(n_q)
    # small whole numbers, so that sums are exact in any order and ties are common
    q = torch.randint(-2, 3, (2, 4, n_q, 16), generator=generator).float()
    k = torch.randint(-2, 3, (2, 2, n_k, 16), generator=generator).float()
    q[:, :, 0] = 0.0
    k[0, 0, n_k // 2] = float("nan")
    got = launch_select(q, k, topk, protected, order)
    assert torch.equal(got, reference.select(q, k, topk, protected, order))


@pytest.mark.parametrize("heads_at_once", [1, 2])
def test_selection_of_a_few_heads_at_a_time_is_that_of_all(monkeypatch, heads_at_once):
    q, k = (torch.randn(1, 3, n, 16, generator=torch.Generator().manual_seed(n)).round() for n in (40, 150))
    monkeypatch.setattr(select, "SCRATCH_BYTES", heads_at_once * 4 * 40 * 152)
    assert torch.equal(launch_select(q, k, 20, 0, 1.0), reference.select(q, k, 20, 0, 1.0))


def test_selection_orders_ties_nan_infinity_and_signed_zeros_as_the_sort():
    # a score is the sum of its key's sixteen equal numbers
    special = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1.0, -1.0, 1e-40, -1e-40, 3e38, 0.0, 1.0]
    keys = torch.zeros(1, 1, len(special), 16)
    keys[..., 0] = torch.tensor(special)
    spread = keys[..., :1].repeat(1, 1, 1, 16) / 16
    scores = spread.sum(-1)
    for kept in range(1, len(special) + 1):
        found = launch_select(torch.ones(1, 1, 1, 16), spread, kept, 0, 1.0)
        best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :kept].sort(-1).values
        assert found.flatten().tolist() == best.flatten().tolist()


@pytest.mark.parametrize(("grid", "tile"), [((4, 8, 12), (4, 4, 4)), ((4, 8, 16), (2, 8, 8)), ((8, 4, 8), (4, 4, 8))])
def test_tiles_in_the_raster_have_the_gradients_of_tiles_in_a_row(grid, tile):
    (q, k, v, dout), tokens, flat, raster = make_raster(grid, tile)
    scale, config = 0.3, BackwardConfig(64, 64, 4, 1)
    rows = [x[:, tokens].contiguous() for x in (q, k, v, dout)]
    out, lse = reference.attention_forward(*rows[:3], flat, scale)
    in_raster = torch.empty_like(out)
    in_raster[:, tokens] = out
    stats = backward.launch_stats(in_raster, dout, lse, None, raster.raster)
    for got, want in zip(stats, backward.launch_stats(out, rows[3], lse, None), strict=True):
        assert torch.equal(got[..., : len(tokens)], want[..., : len(tokens)])
    wanted = [torch.empty_like(x) for x in rows[1:3]]
    got = [torch.full_like(x, float("nan")) for x in (k, v)]
    common = {"softmax_scale": scale, "config": config}
    backward.launch_dkdv(*rows, *stats, *wanted, flat, **common)
    backward.launch_dkdv(rows[0], k, v, rows[3], *stats, *got, raster, **common)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a[:, tokens], b)
