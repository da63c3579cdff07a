import pytest
import torch
from sage_scenarios import Scenario, make_tensors

from attnmux_sage.prepare import (
    E4M3_MAX,
    KEY_BLOCK,
    LOG2_E,
    QUERY_TILE,
    dequantise_values,
    hadamard,
    key_order,
    padded_head,
    quantise,
)

CPU = torch.device("cpu")
SCENARIO = Scenario(len_q=200, len_k=150, heads=4, batch=2, head_size=48, dtype=torch.float32)


def prepared(scenario=SCENARIO, **options):
    q, k, v = make_tensors(scenario)
    return q, k, v, quantise(q, k, v, softmax_scale=scenario.softmax_scale, fp8_values=scenario.pv == "fp8", **options)


@pytest.mark.parametrize("size", [64, 128])
def test_rotation_keeps_products(size):
    matrix = hadamard(size, CPU)
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)


def test_rotation_spreads_one_channel_over_all():
    channel = torch.zeros(128, dtype=torch.float64)
    channel[17] = 3.0
    assert torch.equal((channel @ hadamard(128, CPU)).abs(), torch.full((128,), 3.0, dtype=torch.float64))


def test_key_order_is_a_permutation_within_sixteen():
    order = key_order(CPU)
    assert torch.equal(order.sort().values, torch.arange(KEY_BLOCK))
    assert torch.equal(order // 16, torch.arange(KEY_BLOCK) // 16)
    assert order[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]


@pytest.mark.parametrize(("head_size", "padded"), [(16, 64), (64, 64), (72, 128), (128, 128)])
def test_head_is_padded_to_what_the_tensor_cores_take(head_size, padded):
    assert padded_head(head_size) == padded


@pytest.mark.parametrize("softmax_scale", [0.11, -0.3, 0.0])
def test_scores_are_those_of_the_tensors_within_half_a_step(softmax_scale):
    scenario = SCENARIO.but(softmax_scale=softmax_scale)
    q, k, _, z = prepared(scenario)
    assert z.q8.shape == (2, 4, 2 * QUERY_TILE, 64)
    assert z.k8.shape == (2, 2, 3 * KEY_BLOCK, 64)
    q_rows = z.q8[:, :, :200].double() * z.q_scale[:, :, :200, None].double()
    k_rows = z.k8[:, :, :150].double() * z.k_scale.repeat_interleave(KEY_BLOCK, 2)[:, :, :150, None].double()
    smooth = (k - k.mean(1, keepdim=True)).double().transpose(1, 2).repeat_interleave(2, 1)
    exact = q.double().transpose(1, 2) @ smooth.transpose(-1, -2) * softmax_scale
    found = q_rows @ k_rows.repeat_interleave(2, 1).transpose(-1, -2) / LOG2_E
    # half a step of one factor against the other, summed over the channels, for both
    step_q, step_k = (
        0.5 * z.q_scale[:, :, :200, None].double(),
        0.5 * z.k_scale.repeat_interleave(KEY_BLOCK, 2).double(),
    )
    step_k = step_k[:, :, None, :150].repeat_interleave(2, 1)
    size_q, size_k = q_rows.abs().sum(-1, keepdim=True), k_rows.abs().sum(-1).repeat_interleave(2, 1)[:, :, None]
    bound = (step_q * size_k + step_k * size_q + 64 * step_q * step_k) / LOG2_E
    assert ((found - exact).abs() <= bound * 1.001 + 1e-9).all()


def test_padding_is_zero():
    *_, z = prepared()
    assert not z.q8[:, :, 200:].any()
    assert not z.k8[:, :, 150:].any()
    assert not dequantise_values(z)[:, :, 150:].any()
    assert not dequantise_values(z)[..., 48:].any()


def test_values_are_within_half_a_step_of_e4m3():
    _, _, v, z = prepared()
    found = dequantise_values(z)[:, :, :150, :48] * z.v_scale[:, :, None, :48]
    exact = (v - v.mean(1, keepdim=True)).transpose(1, 2)
    # three bits of mantissa, and below the normal numbers steps of 2 ** -9
    bound = exact.abs() / 16 + z.v_scale[:, :, None, :48] * 2.0**-10
    assert ((found - exact).abs() <= bound * 1.001).all()
    assert dequantise_values(z).abs().amax() == E4M3_MAX


def test_what_values_lost_by_rounding_is_in_the_rest():
    _, _, v, z = prepared()
    kept = (dequantise_values(z) * z.v_scale[:, :, None])[:, :, :150, :48]
    torch.testing.assert_close(kept.mean(2) + z.v_rest[..., :48], v.transpose(1, 2).mean(2), rtol=1e-5, atol=1e-5)
    assert not z.v_rest[..., 48:].any()


def test_lse_shift_is_what_smoothing_took_off():
    q, k, _, z = prepared()
    mean = k.mean(1).repeat_interleave(2, 1)
    torch.testing.assert_close(z.lse_shift, torch.einsum("bshd,bhd->bhs", q, mean) * 0.11, rtol=1e-4, atol=1e-5)


def test_every_tensor_is_contiguous_and_finite():
    *_, z = prepared(SCENARIO.but(layout="heads_first"))
    for x in (z.q8, z.q_scale, z.k8, z.k_scale, z.v8, z.v_scale, z.v_rest, z.lse_shift):
        assert x.is_contiguous()
        assert x.float().isfinite().all()


def test_without_e4m3_there_are_no_values():
    *_, z = prepared(SCENARIO.but(pv="bf16"))
    assert z.v8 is None
    assert z.v_scale is None
    assert z.v_rest is None
