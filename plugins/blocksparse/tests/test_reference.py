"""The oracle against attention written out row by row, in float64."""

import pytest
import torch
from blocksparse_scenarios import Scenario, make_tensors

from attnmux_blocksparse import BlockIndex, block_sparse_attention, reference

BASE = Scenario(batch=2, len_q=130, len_k=200, heads=4, heads_k=2, head_dim=8, dtype=torch.float64)
CASES = {
    "plain": BASE,
    "empty_rows": BASE.but(empty_rows=True),
    "partial": BASE.but(partial=True),
    "shared": BASE.but(shared=True),
    "blocks_128x256": BASE.but(block_q=128, block_k=256, len_k=300),
    "one_token": BASE.but(len_q=1, len_k=1),
    "scale_zero": BASE.but(softmax_scale=0.0),
    "scale_negative": BASE.but(softmax_scale=-1.0),
}


def brute_force(q, k, v, index, scale):
    """One query row at a time, gathering the tokens it attends to."""
    out, lse = torch.zeros_like(q), torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=q.dtype)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            b_i, h_i = min(b, index.blocks.shape[0] - 1), min(h, index.blocks.shape[1] - 1)
            for i in range(q.shape[1]):
                block, place = divmod(i, index.block_q)
                if (
                    index.q_lengths is not None
                    and place >= index.q_lengths[min(b, index.q_lengths.shape[0] - 1), block]
                ):
                    continue
                tokens = []
                for c in index.blocks[b_i, h_i, block, : index.counts[b_i, h_i, block]].tolist():
                    size = index.block_k
                    if index.k_lengths is not None:
                        size = int(index.k_lengths[min(b, index.k_lengths.shape[0] - 1), c])
                    tokens += [t for t in range(c * index.block_k, c * index.block_k + size) if t < k.shape[1]]
                if tokens:
                    scores = k[b, tokens, h // group] @ q[b, i, h] * scale
                    lse[b, h, i] = scores.logsumexp(0)
                    out[b, i, h] = scores.softmax(0) @ v[b, tokens, h // group]
    return out, lse


@pytest.mark.parametrize("name", CASES)
def test_reference_agrees_with_brute_force(name):
    scenario = CASES[name]
    q, k, v, _, index = make_tensors(scenario)
    out, lse = reference.attention_forward(q, k, v, index, scenario.scale)
    want_out, want_lse = brute_force(q, k, v, index, scenario.scale)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("name", CASES)
def test_closed_form_gradients_are_those_of_autograd(name):
    scenario = CASES[name]
    q, k, v, dout, index = make_tensors(scenario)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention_forward(*leaves, index, scenario.scale)
    dlse = torch.randn(lse.shape, dtype=lse.dtype)
    is_used = torch.isfinite(lse)
    loss = (torch.nan_to_num(dout) * out).sum() + (dlse * lse)[is_used].sum()
    want = torch.autograd.grad(loss, leaves)
    got = reference.attention_backward(dout, dlse, q, k, v, index, scenario.scale)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["plain", "empty_rows", "partial", "scale_negative"])
def test_operator_passes_gradcheck(name):
    scenario = CASES[name].but(batch=1, len_q=70, len_k=66, heads=2, heads_k=1, head_dim=2, finite_padding=True)
    q, k, v, _, index = make_tensors(scenario)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def call(q, k, v):
        return block_sparse_attention(q, k, v, index, softmax_scale=scenario.scale)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_all_blocks_are_dense_attention():
    scenario = BASE.but(keep=1.1)
    q, k, v, _, index = make_tensors(scenario)
    out = block_sparse_attention(q, k, v, index)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_fully_masked_rows_are_zero_with_zero_gradients():
    q, k, v = (torch.randn(1, 128, 1, 16, requires_grad=True) for _ in range(3))
    index = BlockIndex.from_block_mask(torch.tensor([[False, False], [True, False]]), block_q=64, block_k=64)
    out, lse = block_sparse_attention(q, k, v, index, return_lse=True)
    assert (out[:, :64] == 0).all()
    assert (lse[..., :64] == float("-inf")).all()
    assert torch.isfinite(lse[..., 64:]).all()
    out.sum().backward()
    assert (q.grad[:, :64] == 0).all()
    assert (k.grad[:, 64:] == 0).all() and (v.grad[:, 64:] == 0).all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_padding_may_hold_nan():
    scenario = BASE.but(partial=True)
    q, k, v, dout, index = make_tensors(scenario)
    assert any(torch.isnan(x).any() for x in (q, k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, index)
    assert torch.isfinite(out).all()
    for grad in torch.autograd.grad(out, leaves, dout):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_types_are_computed_in_float32(dtype):
    q, k, v, _, index = make_tensors(BASE.but(dtype=dtype))
    out, lse = block_sparse_attention(q, k, v, index, return_lse=True)
    want, _ = reference.attention_forward(*(x.float() for x in (q, k, v)), index, BASE.scale)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, want.to(dtype))
