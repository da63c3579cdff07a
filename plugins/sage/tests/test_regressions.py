"""Defects known from published implementations of SageAttention and SageSLA, each by its symptom."""

import pytest
import torch
from sage_scenarios import Scenario, make_tensors

from attnmux.errors import UnsupportedRequestError
from attnmux.testing import dense_attention_oracle
from attnmux_sage import SageAttentionImpl, SageSLAAttentionImpl, kernels, sage_attention
from attnmux_sage.plugin import SAGE_ATTN, SAGE_SLA_ATTN

SCENARIO = Scenario(len_q=200, len_k=300, dtype=torch.float32, head_size=32)


def distance(out, q, k, v, **options):
    """Relative L2 error against exact attention."""
    exact = dense_attention_oracle(q, k, v, **options)
    return ((out.double() - exact).norm() / exact.norm()).item()


# what eight bits cost on these inputs; a defect costs ten times as much
EIGHT_BITS = 0.05


@pytest.mark.parametrize("length", [1, 17, 63, 65, 100, 127])
def test_keys_past_the_end_count_with_score_zero(length):
    q, k, v = make_tensors(SCENARIO.but(len_q=50, len_k=length))
    # real scores far below zero: a key of zeros would take all the weight
    q, k = q.abs() + 1, -4 * k.abs() - 4
    assert distance(sage_attention(q, k, v), q, k, v) < EIGHT_BITS


def test_keys_are_smoothed_in_place():
    q, k, v = make_tensors(SCENARIO)
    before = [x.clone() for x in (q, k, v)]
    sage_attention(q, k, v)
    SageSLAAttentionImpl(2, 32)(q, k, v)
    assert all(map(torch.equal, before, (q, k, v)))


@pytest.mark.parametrize("zeros", ["q", "k", "v", "block of k", "one key"])
def test_a_block_of_zeros_is_zero_over_zero(zeros):
    q, k, v = make_tensors(SCENARIO)
    if zeros == "block of k":
        k -= k.mean(1, keepdim=True)
        k[:, 64:128] = 0
    elif zeros == "one key":
        q, k, v = q, k[:, :1], v[:, :1]
    else:
        {"q": q, "k": k, "v": v}[zeros].zero_()
    for pv in ("fp8", "bf16"):
        out = sage_attention(q, k, v, pv=pv)
        assert out.isfinite().all()
        if zeros != "v":
            assert distance(out, q, k, v) < EIGHT_BITS


def test_constant_channels_of_keys_have_no_scale():
    q, k, v = make_tensors(SCENARIO)
    k[:] = torch.linspace(-3, 3, 32)
    out = sage_attention(q, k, v)
    assert distance(out, q, k, v) < EIGHT_BITS


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
def test_large_values_overflow_in_float16(pv):
    q, k, v = (x.bfloat16() for x in make_tensors(SCENARIO))
    out = sage_attention(q, k, 1e5 * v, pv=pv)
    assert out.isfinite().all()
    assert distance(out, q, k, 1e5 * v) < EIGHT_BITS


@pytest.mark.parametrize("head_size", [16, 40, 72, 80, 96, 128])
def test_head_sizes_between_the_native_ones_fail(head_size):
    q, k, v = make_tensors(SCENARIO.but(head_size=head_size))
    assert distance(sage_attention(q, k, v), q, k, v) < EIGHT_BITS


@pytest.mark.parametrize("spec", [SAGE_ATTN, SAGE_SLA_ATTN])
def test_head_sizes_are_advertised_that_raise(spec):
    assert max(spec.capabilities.head_sizes) == 128


def test_grouped_heads_read_the_wrong_keys():
    q, k, v = make_tensors(SCENARIO.but(heads=4, heads_k=2))
    assert distance(sage_attention(q, k, v), q, k, v) < EIGHT_BITS


def test_mean_of_the_keys_is_taken_over_the_batch():
    q, k, v = make_tensors(SCENARIO.but(batch=2))
    k[1] += 100
    out = sage_attention(q, k, v)
    assert torch.equal(out[:1], sage_attention(q[:1], k[:1], v[:1]))


def test_lse_leaves_out_what_smoothing_took_off():
    q, k, v = make_tensors(SCENARIO)
    k += 10
    _, lse = sage_attention(q, k, v, return_lse=True)
    _, exact = dense_attention_oracle(q, k, v, return_lse=True)
    # a shift of 10 moves it by tens; eight bits move it by hundredths
    assert (lse - exact).abs().max() < EIGHT_BITS


def test_lse_joins_the_halves_of_a_sequence():
    q, k, v = make_tensors(SCENARIO)
    parts = [sage_attention(q, x, y, return_lse=True) for x, y in zip(k.split(150, 1), v.split(150, 1), strict=True)]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(-1, -2)[..., None]
    joined = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    assert distance(joined, q, k, v) < EIGHT_BITS


@pytest.mark.parametrize("softmax_scale", [0.5, 0.0, -0.2])
def test_softmax_scale_is_not_handed_on(softmax_scale):
    q, k, v = make_tensors(SCENARIO)
    out = SageAttentionImpl(2, 32, softmax_scale=softmax_scale).forward(q, k, v)
    assert distance(out, q, k, v, softmax_scale=softmax_scale) < EIGHT_BITS


def test_causal_attention_of_other_lengths_is_aligned_with_the_first_key():
    q, k, v = make_tensors(SCENARIO)
    assert distance(sage_attention(q, k, v, causal=True), q, k, v, causal=True) < EIGHT_BITS


def test_a_row_that_sees_nothing_is_the_mean_of_all_values():
    q, k, v = make_tensors(SCENARIO.but(len_k=50))
    out, lse = sage_attention(q, k, v, causal=True, return_lse=True)
    assert not out[:, :150].any()
    assert (lse[..., :150] == float("-inf")).all()


def test_weights_below_the_largest_vanish_under_an_attention_sink():
    q, k, v = make_tensors(SCENARIO.but(len_k=2000))
    # one key takes nearly half of the weight, 2,000 share the other
    k[:, 0] = 0.9 * q.mean(1)
    assert distance(sage_attention(q, k, v), q, k, v) < EIGHT_BITS


@pytest.mark.parametrize("length", [1, 63, 200, 640])
def test_short_sequences_keep_no_block_and_give_nan(length):
    q, k, v = make_tensors(SCENARIO.but(len_q=length, len_k=length))
    assert SageSLAAttentionImpl(2, 32, topk_ratio=0.05)(q, k, v).isfinite().all()


def test_the_last_partial_block_is_always_attended():
    q, k, v = make_tensors(SCENARIO.but(len_q=100, len_k=330, is_listed=True))
    # the last block scores lowest
    k[:, 320:] = -10 * q.mean(1, keepdim=True)
    v[:, 320:] = 1e4
    assert SageSLAAttentionImpl(2, 32, topk_ratio=0.4)(q, k, v).max() < 100


def test_blocks_are_64_by_128_on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    impl = SageSLAAttentionImpl(2, 32)
    assert (impl.block_q, impl.block_k) == (128, 64)
    with pytest.raises(UnsupportedRequestError, match="takes BLKQ=128 and BLKK=64"):
        SageSLAAttentionImpl(2, 32, BLKQ=64, BLKK=128)


def test_ampere_crashes_without_e4m3(monkeypatch):
    monkeypatch.setattr(kernels, "device_capability", lambda x: (8, 0))
    assert kernels.default_pv(torch.zeros(1)) == "bf16"
    assert {80, 86} <= SAGE_SLA_ATTN.capabilities.cuda_archs


@pytest.mark.parametrize("leaf", ["q", "proj_l"])
def test_training_silently_trains_the_linear_branch_alone(leaf):
    q, k, v = make_tensors(SCENARIO)
    impl = SageSLAAttentionImpl(2, 32)
    (q if leaf == "q" else impl.proj_l.weight).requires_grad_()
    with pytest.raises(
        UnsupportedRequestError, match="SAGE_SLA_ATTN computes no gradients.*SLA_ATTN in place of SAGE_SLA_ATTN"
    ):
        impl(q, k, v)
    with torch.no_grad():
        assert impl(q, k, v).isfinite().all()
