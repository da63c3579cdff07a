"""The Triton kernels in Triton's interpreter, on the CPU. Run by test_kernels.py in a process of its own."""

import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_kernels.py"

# The interpreter is chosen by the variable above, before triton is imported.
# ruff: noqa: E402
from vsa_scenarios import BASE, CASES, make_tensors, run

from attnmux_vsa import ops
from attnmux_vsa.kernels import coarse, tiles
from attnmux_vsa.reference import score_means


def tables_of(tiling):
    return tiling.token_of_slot, tiling.variable_block_sizes


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("every_tile", "negative_scale", "large_inputs")])
def test_the_whole_path_is_the_reference(name):
    """Kernels around the block-sparse operator's reference, forward and backward, in float32."""
    scenario = CASES[name]
    q, k, v, gate, dout, tiling = make_tensors(scenario, seed=len(name))

    def by_kernels(q, k, v, tiling, *, gate_compress, softmax_scale, engine):
        scale = scenario.head_dim**-0.5 if softmax_scale is None else softmax_scale
        return ops._by_kernels(q, k, v, tiling, tiling.topk, scale, gate_compress, None)

    exact = run(q, k, v, gate, dout, tiling, scenario, engine="reference", dtype=torch.float64)
    got = run(q, k, v, gate, dout, tiling, scenario, attend=by_kernels)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_padding_of_tiles_is_zero_and_counts_in_no_mean():
    q, _, _, _, _, tiling = make_tensors(BASE.but(grid=(5, 7, 3)))
    (tiled, *_), (means, *_) = tiles.read_inputs(q, q, q, *tables_of(tiling), with_tiles=True, with_v_mean=False)
    assert torch.equal(tiled, tiles.tile(q, *tables_of(tiling)))
    is_padding = tiling.token_of_slot < 0
    assert (tiled[:, :, is_padding] == 0).all()
    for tile, size in enumerate(tiling.variable_block_sizes.tolist()):
        tokens = tiling.token_of_slot[tile * 64 : tile * 64 + size].long()
        torch.testing.assert_close(means[:, :, tile], q[:, tokens].mean(1))


@pytest.mark.parametrize(("n_tiles", "heads", "heads_k"), [(1, 1, 1), (33, 2, 1), (70, 2, 2)])
def test_coarse_attention_and_its_gradients(n_tiles, heads, heads_k):
    shape = (2, heads_k, n_tiles, 16)
    q, k, v = torch.randn(2, heads, n_tiles, 16), torch.randn(shape), torch.randn(shape)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    weights = score_means(*leaves[:2], 0.3).softmax(-1)
    want = weights @ leaves[2].repeat_interleave(heads // heads_k, 1)
    dout = torch.randn_like(want)
    out, lse = coarse.coarse_attention(q, k, v, 0.3)
    grads = coarse.coarse_backward(dout.float(), q, k, v, out, lse, 0.3)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    for got, exact in zip(grads, torch.autograd.grad(want, leaves, dout), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_backward_keeps_the_inputs_and_one_branch(gated):
    """The large tensors kept are q, k, v, the gate and one more: the fine branch, or without a gate the output."""
    q, k, v, gate, _, tiling = make_tensors(BASE.but(grid=(8, 8, 8), gate=gated))
    for x in (q, k, v, *([gate] if gated else [])):
        x.requires_grad_()
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = ops._by_kernels(q, k, v, tiling, tiling.topk, 0.2, gate, None)
    given = {x.untyped_storage().data_ptr() for x in (q, k, v, gate) if x is not None}
    assert given <= set(kept)
    own = {place: x.untyped_storage().nbytes() for place, x in kept.items() if place not in given}
    whole = q.untyped_storage().nbytes()
    assert [size for size in own.values() if size > whole // 8] == [whole]
    assert (out.untyped_storage().data_ptr() in own) == (not gated)
    assert sum(own.values()) < 1.5 * whole


def test_the_operator_passes_opcheck():
    q, k, v, gate, _, tiling = make_tensors(BASE.but(grid=(4, 8, 5)))
    for gates in (gate, None):
        leaves = [x if x is None else x.requires_grad_() for x in (q, k, v, gates)]
        arguments = (*leaves, tiling.token_of_slot, tiling.slot_grid, tiling.variable_block_sizes, [4, 4, 4], 2, 0.2)
        torch.library.opcheck(torch.ops.attnmux_vsa.forward.default, (*arguments, None, True))
