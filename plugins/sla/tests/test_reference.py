"""The oracle against loops over tokens, its gradients against finite differences, and its limits."""

import pytest
import torch

from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle, make_inputs
from attnmux_blocksparse import block_sparse_attention
from attnmux_sla import AlphaMix, LearnedRouter, select_blocks, sparse_linear_attention
from attnmux_sla.ops import SparseBranch
from attnmux_sla.reference import linear_attention

MAPS = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
}


def tensors(length_q=200, length_k=330, heads=4, heads_k=2, head_size=6, dtype=torch.float64, seed=0):
    q, k, v = make_inputs(
        batch=2,
        length_q=length_q,
        length_k=length_k,
        num_heads=heads,
        num_kv_heads=heads_k,
        head_size=head_size,
        dtype=dtype,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((head_size,) * 2, (head_size,)))
    return q, k, v, weight, bias


def brute_force(q, k, v, weight, bias, feature_map, linear_keys, kept, negligible, scale, block_q=128, block_k=64):
    """SLA by its definition, query block by query block."""
    B, S, H, _ = q.shape
    phi, group = MAPS[feature_map], H // k.shape[2]
    out = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, :, h // group], v[b, :, h // group]
            key_blocks = list(torch.arange(k.shape[1]).split(block_k))
            for rows in torch.arange(S).split(block_q):
                queries = q[b, rows, h]
                scores = [float(queries.mean(0) @ keys[block].mean(0)) for block in key_blocks]
                best_first = sorted(range(len(key_blocks)), key=lambda j: -scores[j])
                critical, lowest = best_first[:kept], best_first[len(best_first) - negligible :]
                tokens = torch.cat([key_blocks[j] for j in sorted(critical)])
                sparse = (queries @ keys[tokens].T * scale).softmax(-1) @ values[tokens]
                seen = {
                    "all": range(len(key_blocks)),
                    "complement": [j for j in range(len(key_blocks)) if j not in critical],
                    "marginal": [j for j in range(len(key_blocks)) if j not in critical and j not in lowest],
                }[linear_keys]
                tokens = torch.cat([key_blocks[j] for j in seen]) if len(seen) else torch.empty(0, dtype=torch.long)
                weights = phi(queries) @ phi(keys[tokens]).T
                linear = weights @ values[tokens] / (weights.sum(-1, keepdim=True) + 1e-5)
                out[b, rows, h] = sparse + linear @ weight.T + bias
    return out


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("linear_keys", ["all", "complement", "marginal"])
def test_the_operator_is_the_definition(feature_map, linear_keys):
    inputs = tensors()
    out = sparse_linear_attention(
        *inputs,
        topk_ratio=0.35,
        feature_map=feature_map,
        linear_keys=linear_keys,
        negligible_ratio=0.4,
        softmax_scale=0.3,
    )
    exact = brute_force(*inputs, feature_map, linear_keys, kept=2, negligible=2, scale=0.3)
    torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("linear_keys", ["complement", "marginal"])
def test_no_keys_left_give_the_sparse_branch_alone(linear_keys):
    q, k, v, weight, bias = tensors()
    out = sparse_linear_attention(q, k, v, weight, bias, topk_ratio=1.0, linear_keys=linear_keys)
    torch.testing.assert_close(out, dense_attention_oracle(q, k, v) + bias)


def test_chunks_of_heads_are_computed_alike(monkeypatch):
    inputs = [x.requires_grad_() for x in tensors()]
    whole = sparse_linear_attention(*inputs, topk_ratio=0.35, linear_keys="complement")
    expected = torch.autograd.grad(whole.square().sum(), inputs)
    monkeypatch.setattr("attnmux_sla.reference._CHUNK_NUMBERS", 3 * 8 * 36)
    chunked = sparse_linear_attention(*inputs, topk_ratio=0.35, linear_keys="complement")
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked.square().sum(), inputs), expected)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("variant", ["all", "complement", "marginal", "alpha"])
def test_gradients_are_those_of_finite_differences(feature_map, variant):
    # blocks are chosen with a margin, so that a finite difference does not change the choice
    q, k, v, weight, bias = tensors(length_q=130, length_k=200, heads=2, heads_k=1, head_size=3, seed=3)
    q, k, v = (x[:1] for x in (q, k, v))
    options = {"topk_ratio": 0.5, "feature_map": feature_map, "softmax_scale": 0.7}

    def run(q, k, v, weight, bias):
        # a few tokens stand for all: gradcheck runs once per number
        full = [torch.cat([x, rest[:, x.shape[1] :]], 1) for x, rest in zip((q, k, v), frozen, strict=True)]
        if variant == "alpha":
            mix = lambda sparse, linear, q: sparse * (q @ weight).sigmoid() + linear * bias  # noqa: E731
            return sparse_linear_attention(*full, linear_keys="complement", combine=mix, **options)
        return sparse_linear_attention(*full, weight, bias, linear_keys=variant, **options)

    frozen = (q, k, v)
    leaves = [x[:, :4].clone().requires_grad_() for x in frozen] + [weight.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("feature_map", MAPS)
def test_the_closed_form_is_what_autograd_finds(feature_map):
    inputs = [x.requires_grad_() for x in tensors()]
    _, _, _, weight, bias = inputs
    options = {"topk_ratio": 0.35, "feature_map": feature_map}
    fused = sparse_linear_attention(*inputs, **options)
    composed = sparse_linear_attention(
        *inputs[:3], combine=lambda sparse, linear, q: sparse + linear @ weight.T + bias, **options
    )
    torch.testing.assert_close(fused, composed)
    cotangent = torch.randn(fused.shape, generator=torch.Generator().manual_seed(9), dtype=fused.dtype)
    torch.testing.assert_close(
        torch.autograd.grad(fused, inputs, cotangent), torch.autograd.grad(composed, inputs, cotangent)
    )


def test_a_zero_projection_is_block_sparse_attention():
    q, k, v, weight, bias = tensors(head_size=16)
    out = sparse_linear_attention(q, k, v, 0 * weight, 0 * bias, topk_ratio=0.35)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, select_blocks(q, k, topk_ratio=0.35)))


def test_every_block_and_a_zero_projection_are_dense_attention():
    q, k, v, weight, _ = tensors(head_size=16, dtype=torch.float32)
    out = sparse_linear_attention(q, k, v, 0 * weight, topk_ratio=1.0)
    assert_close_to_oracle(out, dense_attention_oracle(q, k, v), dense_attention_baseline(q, k, v))


def test_no_projection_is_the_identity():
    q, k, v, _, _ = tensors()
    torch.testing.assert_close(
        sparse_linear_attention(q, k, v), sparse_linear_attention(q, k, v, torch.eye(6, dtype=torch.float64))
    )


def test_equal_values_come_through_the_linear_branch_unchanged():
    q, k, v, _, _ = tensors()
    out = linear_attention(q, k, torch.ones_like(v), feature_map="softmax")
    torch.testing.assert_close(out, torch.ones_like(q), rtol=1e-5, atol=0)


def test_sla2_starts_as_the_even_mix_of_the_plain_choice():
    q, k, v, _, _ = tensors(head_size=16)
    options = {"topk_ratio": 0.35, "linear_keys": "complement"}
    router, mix = LearnedRouter(16).double(), AlphaMix(16).double()
    out = sparse_linear_attention(q, k, v, router=router, combine=mix, **options)
    even = sparse_linear_attention(q, k, v, combine=lambda sparse, linear, q: (sparse + linear) / 2, **options)
    torch.testing.assert_close(out, even)


def test_a_router_changes_the_choice_and_gets_no_gradient_from_it():
    q, k, v, _, _ = tensors(head_size=16)
    router = LearnedRouter(16).double()
    torch.nn.init.normal_(router.proj_k.weight)
    plain, routed = (select_blocks(q, k, topk_ratio=0.35, router=r) for r in (None, router))
    assert not torch.equal(plain.blocks, routed.blocks)
    out = sparse_linear_attention(q.requires_grad_(), k, v, topk_ratio=0.35, router=router)
    (gradient,) = torch.autograd.grad(out.sum(), [router.proj_k.weight], allow_unused=True)
    assert gradient is None
    pooled = (torch.randn(1, 4, 3, 16, dtype=torch.float64) for _ in range(2))
    sum(x.sum() for x in router(*pooled)).backward()
    assert router.proj_k.weight.grad.abs().sum() > 0


def test_alpha_learns_from_both_branches():
    q, k, v, _, _ = tensors(head_size=16)
    mix = AlphaMix(16).double()
    sparse_linear_attention(q, k, v, combine=mix, linear_keys="complement").square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in mix.parameters())


@pytest.mark.parametrize("linear_keys", ["all", "complement"])
def test_another_sparse_branch_takes_the_place_of_the_operator(linear_keys):
    q, k, v, _, _ = tensors(head_size=16)
    calls = []

    class Doubled(SparseBranch):
        def attend(self, q, k, v, index, softmax_scale):
            calls.append(softmax_scale)
            return 2 * block_sparse_attention(q, k, v, index, softmax_scale=softmax_scale)

    options = {"topk_ratio": 0.35, "linear_keys": linear_keys, "softmax_scale": 0.3}
    once, twice = (sparse_linear_attention(q, k, v, sparse_branch=x, **options) for x in (None, Doubled()))
    sparse = block_sparse_attention(q, k, v, select_blocks(q, k, topk_ratio=0.35), softmax_scale=0.3)
    torch.testing.assert_close(twice, once + sparse)
    assert calls == [0.3]


def test_gradients_pass_through_another_sparse_branch():
    class Same(SparseBranch):
        def attend(self, q, k, v, index, softmax_scale):
            return block_sparse_attention(q, k, v, index, softmax_scale=softmax_scale)

    q, k, v, _, _ = tensors(head_size=16)
    grads = []
    for branch in (None, Same()):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = sparse_linear_attention(*leaves, topk_ratio=0.35, sparse_branch=branch)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
