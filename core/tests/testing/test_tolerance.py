"""The error rule and the oracle behind it."""

import pytest
import torch
from torch.nn import functional as F

from attnmux.testing import (
    INPUT_SCALES,
    LAYOUTS,
    assert_close_to_oracle,
    dense_attention_baseline,
    dense_attention_oracle,
    make_inputs,
    measure_error,
    poisoned_memory,
    with_layout,
)


def brute_force(q, k, v, scale, visible):
    """Attention one query at a time, in Python loops over everything but D."""
    B, length_q, H, D = q.shape
    group = H // k.shape[2]
    output = torch.zeros(B, length_q, H, D, dtype=torch.float64)
    lse = torch.full((B, H, length_q), float("-inf"), dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(length_q):
                keys = [j for j in range(k.shape[1]) if visible[i, j]]
                if keys:
                    scores = torch.stack([scale * q[b, i, h].double() @ k[b, j, h // group].double() for j in keys])
                    lse[b, h, i] = scores.logsumexp(0)
                    output[b, i, h] = scores.softmax(0) @ v[b, keys, h // group].double()
    return output, lse


class TestOracle:
    @pytest.mark.parametrize(("length_q", "length_k"), [(5, 5), (3, 6), (6, 3)])
    def test_equals_brute_force(self, length_q, length_k):
        q, k, v = make_inputs(length_q=length_q, length_k=length_k, num_kv_heads=2, head_size=8, batch=1)
        visible = [[j <= i + length_k - length_q for j in range(length_k)] for i in range(length_q)]
        expected = brute_force(q, k, v, 0.3, torch.tensor(visible))
        found = dense_attention_oracle(q, k, v, softmax_scale=0.3, causal=True, return_lse=True)
        torch.testing.assert_close(found, expected)

    def test_additive_mask_is_added_to_the_scaled_scores(self):
        q, k, v = make_inputs(length_q=6, head_size=8, dtype=torch.float64)
        bias = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5 + bias).softmax(-1)
        expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        torch.testing.assert_close(dense_attention_oracle(q, k, v, softmax_scale=0.5, attn_mask=bias), expected)

    def test_empty_rows_are_zero_and_have_zero_gradients(self):
        q, k, v = (x.requires_grad_() for x in make_inputs(length_q=4, head_size=8, dtype=torch.float64))
        mask = torch.ones(4, 4, dtype=torch.bool)
        mask[1] = False
        output, lse = dense_attention_oracle(q, k, v, attn_mask=mask, return_lse=True)
        output.sum().backward()
        assert not output[:, 1].any()
        assert (lse[:, :, 1] == float("-inf")).all()
        assert not q.grad[:, 1].any()
        assert all(x.grad.isfinite().all() for x in (q, k, v))

    @pytest.mark.parametrize("causal", [False, True])
    def test_baseline_is_torch_attention(self, causal):
        q, k, v = make_inputs(num_kv_heads=2)
        expected = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
        )
        torch.testing.assert_close(dense_attention_baseline(q, k, v, causal=causal), expected.transpose(1, 2))


class TestErrorRule:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("input_scale", INPUT_SCALES)
    def test_torch_passes_its_own_rule(self, dtype, input_scale):
        q, k, v = make_inputs(dtype=dtype, input_scale=input_scale)
        output = dense_attention_baseline(q, k, v)
        assert_close_to_oracle(output, dense_attention_oracle(q, k, v), output)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_one_wrong_element_fails_with_both_numbers(self, dtype):
        q, k, v = make_inputs(dtype=dtype)
        baseline = dense_attention_baseline(q, k, v)
        wrong = baseline.clone()
        wrong[1, 2, 3, 4] += 0.1
        with pytest.raises(
            AssertionError, match=r"largest error .* at \(1, 2, 3, 4\).*PyTorch's own attention .* off by"
        ):
            assert_close_to_oracle(wrong, dense_attention_oracle(q, k, v), baseline)

    def test_norm_that_is_one_percent_off_fails(self):
        oracle = torch.ones(1000, dtype=torch.float64)
        with pytest.raises(AssertionError, match="norm off by"):
            assert_close_to_oracle((oracle * 1.01).half(), oracle, measure_error(oracle, oracle))

    def test_gradient_with_two_percent_of_noise_fails(self):
        generator = torch.Generator().manual_seed(0)
        oracle = torch.randn(10000, dtype=torch.float64, generator=generator)
        noisy = oracle + 0.02 * torch.randn(10000, dtype=torch.float64, generator=generator)
        with pytest.raises(AssertionError, match="relative L2 error 2"):
            assert_close_to_oracle(noisy.half(), oracle, oracle.half(), kind="gradient")

    def test_nan_fails(self):
        oracle = torch.zeros(4, dtype=torch.float64)
        with pytest.raises(AssertionError, match="1 of 4 values are NaN or infinite"):
            assert_close_to_oracle(torch.tensor([0, 0, float("nan"), 0]), oracle, oracle)

    def test_other_shape_fails(self):
        oracle = torch.zeros(4, 1, dtype=torch.float64)
        with pytest.raises(AssertionError, match=r"shape \[4\], expected \[4, 1\]"):
            assert_close_to_oracle(torch.zeros(4), oracle, oracle)

    def test_rounding_of_a_vanishing_gradient_passes(self):
        oracle = torch.zeros(8, dtype=torch.float64)
        rounding = torch.full((8,), 1e-7)
        with pytest.raises(AssertionError, match="largest error"):
            assert_close_to_oracle(rounding, oracle, oracle, kind="gradient")
        assert_close_to_oracle(rounding, oracle, oracle, kind="gradient", term_size=1.0)


class TestInputs:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_hold_the_values_with_d_contiguous(self, layout):
        x = make_inputs(length_q=5).q
        placed = with_layout(x, layout)
        assert torch.equal(placed, x)
        assert placed.stride(-1) == 1
        assert placed.is_contiguous() == (layout == "contiguous")

    def test_unknown_layout_is_refused(self):
        with pytest.raises(ValueError, match="layout='diagonal' is unknown"):
            make_inputs(layout="diagonal")

    def test_seed_decides_and_the_global_generator_is_left_alone(self):
        state = torch.get_rng_state()
        assert torch.equal(make_inputs(seed=3).q, make_inputs(seed=3).q)
        assert not torch.equal(make_inputs(seed=3).q, make_inputs(seed=4).q)
        assert torch.equal(torch.get_rng_state(), state)


class TestPoison:
    @pytest.mark.parametrize(
        "allocate",
        [
            lambda: torch.empty(3),
            lambda: torch.empty_like(torch.ones(3)),
            lambda: torch.empty_strided((3,), (1,)),
            lambda: torch.ones(1).new_empty(3),
            lambda: torch.ones(1).new_empty_strided((3,), (1,)),
            lambda: torch.empty(3, requires_grad=True),
        ],
    )
    def test_fresh_memory_is_nan_inside_the_block_only(self, allocate):
        with poisoned_memory():
            assert allocate().isnan().all()
        originals = (torch.empty, torch.Tensor.new_empty)
        with pytest.raises(RuntimeError, match="stop"), poisoned_memory():
            raise RuntimeError("stop")
        assert (torch.empty, torch.Tensor.new_empty) == originals

    def test_integers_are_left_alone(self):
        with poisoned_memory():
            assert torch.empty(3, dtype=torch.int64).shape == (3,)
