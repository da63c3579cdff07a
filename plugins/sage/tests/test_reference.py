"""The emulation against softmax attention over the numbers that were quantised, and the accuracy table."""

import pytest
import torch
from sage_accuracy import CASES as ACCURACY
from sage_accuracy import assert_accurate
from sage_scenarios import Scenario, make_lists, make_tensors

from attnmux_sage import sage_attention
from attnmux_sage.prepare import KEY_BLOCK, LOG2_E, dequantise_values, quantise
from attnmux_sage.reference import attend

SCENARIO = Scenario(batch=2, len_q=300, len_k=450, heads=4, head_size=32, dtype=torch.float32)
PATTERNS = {"dense": {}, "causal": {"causal": True}, "lists": {"is_listed": True}}


def visible_pairs(scenario, blocks, counts):
    """bool [B, H, S_q, S_k], by brute force."""
    visible = torch.ones(scenario.batch, scenario.heads, scenario.len_q, scenario.len_k, dtype=torch.bool)
    if scenario.causal:
        visible &= torch.ones(scenario.len_q, scenario.len_k, dtype=torch.bool).tril(scenario.len_k - scenario.len_q)
    if blocks is not None:
        for b in range(scenario.batch):
            for h in range(scenario.heads):
                for i in range(scenario.len_q):
                    kept = blocks[b, h, i // 128, : counts[b, h, i // 128]]
                    visible[b, h, i] = (torch.arange(scenario.len_k) // KEY_BLOCK)[:, None].eq(kept).any(-1)
    return visible


def exact_attention(z, values, scenario, visible):
    """Softmax attention in float64 over what the 8-bit tensors stand for."""
    group = scenario.heads // scenario.heads_k
    q = z.q8.double() * z.q_scale.double()[..., None] / LOG2_E
    k = (z.k8.double() * z.k_scale.double().repeat_interleave(KEY_BLOCK, 2)[..., None]).repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2))[:, :, : scenario.len_q, : scenario.len_k].masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    values = values.double()[:, :, : scenario.len_k, : scenario.head_size].repeat_interleave(group, 1)
    return (weights @ values).transpose(1, 2), scores.logsumexp(-1) + z.lse_shift.double()


@pytest.mark.parametrize("keys_per_step", [64, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lengths", [(300, 450), (300, 200), (1, 1), (129, 127), (128, 640)])
def test_without_rounded_weights_it_is_softmax_attention(lengths, pattern, keys_per_step):
    scenario = SCENARIO.but(**PATTERNS[pattern], len_q=lengths[0], len_k=lengths[1])
    q, k, v = make_tensors(scenario)
    blocks, counts = make_lists(scenario)
    z = quantise(q, k, v, softmax_scale=0.11, fp8_values=False)
    out, lse = attend(
        z, v, len_q=lengths[0], blocks=blocks, counts=counts, causal=scenario.causal, keys_per_step=keys_per_step
    )
    wanted, wanted_lse = exact_attention(z, v.transpose(1, 2), scenario, visible_pairs(scenario, blocks, counts))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_weights_in_e4m3_are_off_by_half_a_step_at_most(pattern):
    scenario = SCENARIO.but(**PATTERNS[pattern])
    q, k, v = make_tensors(scenario)
    blocks, counts = make_lists(scenario)
    visible = visible_pairs(scenario, blocks, counts)
    z = quantise(q, k, v, softmax_scale=0.11, fp8_values=True)
    out, lse = attend(z, v, len_q=300, blocks=blocks, counts=counts, causal=scenario.causal)
    values = dequantise_values(z) * z.v_scale[:, :, None]
    wanted, wanted_lse = exact_attention(z, values + z.v_rest[:, :, None], scenario, visible)
    sizes, _ = exact_attention(z, values.abs(), scenario, visible)
    assert ((out.double() - wanted).abs() <= sizes / 15 + 1e-6).all()
    # the sum of the weights is not rounded
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


def test_a_query_with_nothing_to_attend_gets_zeros_and_minus_infinity():
    scenario = SCENARIO.but(causal=True, len_q=300, len_k=100)
    q, k, v = make_tensors(scenario)
    out, lse = sage_attention(q, k, v, causal=True, return_lse=True)
    assert not out[:, :200].any()
    assert (lse[:, :, :200] == float("-inf")).all()
    assert lse[:, :, 200:].isfinite().all()


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy_is_that_of_the_goals(name, pv, length):
    assert_accurate(name, pv, "cpu", length)


def test_the_accuracy_table_can_fail(monkeypatch):
    from attnmux_sage import prepare

    monkeypatch.setattr(prepare, "hadamard", lambda size, device: size**0.5 * torch.eye(size, dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_accurate("outlier_channels", "bf16", "cpu", 1024)
