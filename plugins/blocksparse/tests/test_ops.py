"""The operator: refusals, engines, torch.library and torch.compile."""

import subprocess
import sys

import pytest
import torch
from blocksparse_scenarios import Scenario, make_tensors

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import BlockIndex, block_sparse_attention, reference, select_top_blocks

BASE = Scenario(batch=2, len_q=130, len_k=200, heads=4, heads_k=2, head_dim=16)


def test_imports_load_neither_torch_nor_triton():
    code = (
        "import sys, attnmux_blocksparse; assert 'torch' not in sys.modules; attnmux_blocksparse.block_sparse_attention;"
        "assert 'triton' not in sys.modules or 'attnmux_blocksparse.kernels.launch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})


@pytest.mark.parametrize("leaves", [0, 1])
@pytest.mark.parametrize("partial", [False, True])
def test_operators_pass_opcheck(partial, leaves):
    q, k, v, _, index = make_tensors(BASE.but(partial=partial, finite_padding=True))
    q, k, v = (x.requires_grad_(bool(leaves)) for x in (q, k, v))
    tensors = (index.blocks, index.counts, index.q_lengths, index.k_lengths)
    torch.library.opcheck(
        torch.ops.attnmux_blocksparse.forward.default,
        (q, k, v, *tensors, None, None, None, 64, 64, True, False, 0.25, ""),
    )
    torch.library.opcheck(
        torch.ops.attnmux_blocksparse.transpose.default, (index.blocks, index.counts, index.num_key_blocks)
    )
    out, lse = block_sparse_attention(q, k, v, index, return_lse=True)
    arguments = (torch.randn_like(out), torch.randn_like(lse), *(x.detach() for x in (q, k, v, out, lse)))
    torch.library.opcheck(
        torch.ops.attnmux_blocksparse.backward.default,
        (*arguments, *tensors, None, None, None, 64, 64, True, False, 0.25, ""),
    )


def test_one_compiled_graph_serves_all_lengths_and_list_widths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def call(q, k, v, index):
        return block_sparse_attention(q, k, v, index, return_lse=True)

    # No two sizes of the first call agree: torch takes equal sizes for one symbol.
    for length, keep in ((300, 0.3), (700, 0.2), (500, 0.9)):
        q, k, v, _, index = make_tensors(BASE.but(len_q=length, len_k=2 * length, keep=keep))
        out, lse = call(q, k, v, index)
        want = block_sparse_attention(q, k, v, index, return_lse=True)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert len(graphs) == 1


def test_compiled_gradients_are_those_of_eager():
    q, k, v, dout, index = make_tensors(BASE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves, index), leaves, dout)
    want = torch.autograd.grad(block_sparse_attention(*leaves, index), leaves, dout)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_an_index_can_be_built_inside_a_compiled_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v, scores):
        return block_sparse_attention(q, k, v, BlockIndex.from_topk(scores, 2, block_q=64, block_k=64))

    q, k, v, _, _ = make_tensors(BASE)
    scores = torch.randn(2, 4, 3, 4)
    want = block_sparse_attention(q, k, v, BlockIndex.from_topk(scores, 2, block_q=64, block_k=64))
    assert torch.equal(call(q, k, v, scores), want)


def test_only_inputs_outputs_and_lists_are_saved():
    q, k, v, _, index = make_tensors(BASE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = block_sparse_attention(*leaves, index, return_lse=True)
    allowed = {x.data_ptr() for x in (*leaves, out, lse, index.blocks, index.counts)}
    assert {x.data_ptr() for x in saved} == allowed


def test_gradients_of_strided_inputs_and_expanded_outputs():
    q, k, v, _, index = make_tensors(BASE.but(layout="packed", len_k=130, heads_k=4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(block_sparse_attention(*leaves, index).sum(), leaves)
    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(block_sparse_attention(*dense, index).sum(), dense)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_lse_alone_has_gradients():
    q, k, v, _, index = make_tensors(BASE.but(dtype=torch.float64))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    _, lse = block_sparse_attention(*leaves, index, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), leaves)
    assert dq.abs().sum() > 0 and dk.abs().sum() > 0 and (dv == 0).all()


def call(**changes):
    q, k, v, _, index = make_tensors(BASE)
    arguments = {"q": q, "k": k, "v": v, "index": index, "engine": None, **changes}
    return block_sparse_attention(
        arguments["q"], arguments["k"], arguments["v"], arguments["index"], engine=arguments["engine"]
    )


def all_blocks(nq, nk, **o):
    return BlockIndex.from_block_mask(torch.ones(nq, nk, dtype=torch.bool), block_q=64, block_k=64, **o)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": torch.zeros(2, 130, 64)}, r"q must be \[B, S, H, D\]; got \(2, 130, 64\)"),
        ({"k": torch.zeros(2, 200, 2, 16).double()}, r"k is torch.float64 on cpu, q is torch.float32"),
        ({"v": torch.zeros(2, 201, 2, 16)}, r"k and v must have one shape"),
        (
            {"k": torch.zeros(1, 200, 2, 16), "v": torch.zeros(1, 200, 2, 16)},
            r"must have the batch and head size of q, 2 and 16; got 1 and 16",
        ),
        (
            {"k": torch.zeros(2, 200, 3, 16), "v": torch.zeros(2, 200, 3, 16)},
            r"the 3 heads of k and v must divide the 4 heads of q",
        ),
        ({"q": torch.zeros(2, 130, 4, 32)[..., ::2]}, r"last dimension of q must be contiguous"),
        ({"index": all_blocks(2, 4)}, r"index lists 2 query blocks; 130 query tokens make 3 of 64"),
        ({"index": all_blocks(3, 5)}, r"index is for 5 key blocks; 200 key tokens make 4 of 64"),
        ({"index": torch.zeros(1)}, r"index must be a BlockIndex; got Tensor"),
        (
            {"index": BlockIndex.from_block_mask(torch.ones(1, 3, 3, 4) > 0, block_q=64, block_k=64)},
            r"index.blocks has 1 batches and 3 heads",
        ),
        (
            {"index": all_blocks(3, 4, k_lengths=torch.ones(3, 4, dtype=torch.int32))},
            r"index.k_lengths has 3 rows; needed: 1 or 2",
        ),
        ({"engine": "cuda"}, r"engine='cuda' is not known; engines are reference, triton, hopper"),
        (
            {"engine": "triton"},
            r"engine 'triton' cannot run this call: .*an NVIDIA GPU is needed.*torch.float32; supported: bfloat16, float16",
        ),
        ({"engine": "hopper"}, r"engine 'hopper' cannot run this call: .*head_dim=16; supported: \[64, 128\]"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        call(**changes)


def test_a_refused_engine_lists_its_reasons_as_data():
    with pytest.raises(UnsupportedRequestError) as caught:
        call(engine="hopper")
    assert {"device", "dtype", "head_size"} <= {reason.code for reason in caught.value.reasons}


def test_the_reference_can_be_named():
    q, k, v, _, index = make_tensors(BASE)
    assert torch.equal(
        block_sparse_attention(q, k, v, index, engine="reference"), block_sparse_attention(q, k, v, index)
    )


@pytest.mark.parametrize("length", [0, 1])
def test_no_queries_give_an_empty_output(length):
    k = torch.randn(1, 64, 1, 16)
    q = torch.randn(1, length, 1, 16)
    out, lse = block_sparse_attention(q, k, k, all_blocks(length, 1), return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 1, length)


def brute_force_choice(scores, topk, protected):
    """The kept columns of one row of scores, by the rule."""
    ranked = sorted(range(len(scores)), key=lambda c: (c >= protected, -scores[c], c))
    return sorted(ranked[:topk])


@pytest.mark.parametrize(
    ("topk", "protected", "order"), [(1, 0, 1.0), (4, 2, 1.0), (4, 0, -1.0), (3, 0, 0.0), (9, 9, 1.0)]
)
def test_exactly_topk_best_blocks_are_chosen_and_ties_go_to_the_lower(topk, protected, order):
    q = torch.randint(-2, 3, (2, 4, 5, 3)).double()
    k = torch.randint(-2, 3, (2, 2, 9, 3)).double()
    chosen = select_top_blocks(q, k, topk, protected=protected, order=order)
    assert chosen.dtype == torch.int32
    for b in range(2):
        for h in range(4):
            scores = (q[b, h] * order) @ k[b, h // 2].T
            for row in range(5):
                assert chosen[b, h, row].tolist() == brute_force_choice(scores[row].tolist(), topk, protected)


def test_heads_are_chosen_for_a_few_at_a_time(monkeypatch):
    q, k = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 11, 4)
    whole = select_top_blocks(q, k, 3)
    monkeypatch.setattr(reference, "_CHUNK_NUMBERS", 1)
    assert torch.equal(select_top_blocks(q, k, 3), whole)


def test_selection_passes_opcheck_and_carries_no_gradient():
    q, k = torch.randn(1, 2, 7, 4, requires_grad=True), torch.randn(1, 2, 11, 4)
    assert not select_top_blocks(q, k, 3).requires_grad
    torch.library.opcheck(torch.ops.attnmux_blocksparse.select.default, (q.detach(), k, 3, 1, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled_q": torch.zeros(2, 7, 4)}, r"must be \[B, H, N, D\], float32 or float64; got \(2, 7, 4\)"),
        ({"pooled_q": torch.zeros(1, 2, 7, 4).half()}, r"float32 or float64; got .* torch\.float16"),
        (
            {"pooled_k": torch.zeros(1, 2, 11, 4).double()},
            r"pooled_k is torch\.float64 on cpu, pooled_q is torch\.float32",
        ),
        ({"pooled_k": torch.zeros(1, 3, 11, 4)}, r"pooled_k \(1, 3, 11, 4\) does not go with pooled_q \(1, 2, 7, 4\)"),
        ({"topk": 0}, r"topk=0 must lie in \[1, 11\]"),
        ({"topk": 12}, r"topk=12 must lie in \[1, 11\]"),
        ({"protected": 4}, r"protected=4 must lie in \[0, 3\]"),
    ],
)
def test_selections_that_do_not_fit_are_refused(change, message):
    call = {"pooled_q": torch.zeros(1, 2, 7, 4), "pooled_k": torch.zeros(1, 2, 11, 4), "topk": 3, **change}
    with pytest.raises(UnsupportedRequestError, match=message):
        select_top_blocks(call.pop("pooled_q"), call.pop("pooled_k"), call.pop("topk"), **call)


def test_autocast_changes_no_bit_forward_or_backward():
    q, k, v, dout, index = make_tensors(BASE)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = block_sparse_attention(*leaves, index)
            grads = torch.autograd.grad(out, leaves, dout)
            chosen = select_top_blocks(q.transpose(1, 2), k.transpose(1, 2), 3)
        results.append((out, *grads, chosen))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
