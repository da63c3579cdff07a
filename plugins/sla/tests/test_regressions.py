"""Defects known from published implementations of SLA, each by its symptom."""

import pytest
import torch

from attnmux.errors import UnsupportedRequestError
from attnmux.testing import make_inputs, measure_error
from attnmux_sla import SLAAttentionImpl, SLAAttentionMetadata, SLAAttentionMetadataBuilder, select_blocks
from attnmux_sla.reference import linear_backward, summarize_keys


def tensors(length_q=200, length_k=330, dtype=torch.float64, heads_k=2):
    return make_inputs(
        batch=1, length_q=length_q, length_k=length_k, num_heads=2, num_kv_heads=heads_k, head_size=16, dtype=dtype
    )


def make_impl(**options):
    """A layer whose projection is not zero, in float64."""
    impl = SLAAttentionImpl(2, 16, **options).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in impl.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return impl


@pytest.mark.parametrize("length", [1, 63, 576, 640])
def test_short_sequences_give_nan(length):
    out = make_impl(topk_ratio=0.05)(*tensors(length, length))
    assert out.isfinite().all()


def test_a_ratio_is_truncated_after_binary_rounding():
    q, k, _ = tensors(64, 6400)
    assert select_blocks(q, k, topk_ratio=0.29).blocks.shape[-1] == 29


def test_softmax_scale_is_ignored():
    q, k, v = tensors()
    # the linear branch and the choice of blocks do not read the scale; with all blocks and no projection q does
    scaled = SLAAttentionImpl(2, 16, softmax_scale=0.05, topk_ratio=1.0).double()(q, k, v)
    by_hand = SLAAttentionImpl(2, 16, topk_ratio=1.0).double()(q * 0.05 * 4, k, v)
    torch.testing.assert_close(scaled, by_hand)
    assert not torch.allclose(scaled, SLAAttentionImpl(2, 16, topk_ratio=1.0).double()(q, k, v))


def test_softmax_scale_of_zero_is_taken_for_none():
    q, k, v = tensors()
    out = SLAAttentionImpl(2, 16, softmax_scale=0.0, topk_ratio=1.0).double()(q, k, v)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))


def test_causal_is_ignored():
    with pytest.raises(UnsupportedRequestError, match=r"SLA_ATTN cannot run causal=True.*TORCH_SDPA"):
        SLAAttentionImpl(2, 16, causal=True)


def test_grouped_query_heads_read_out_of_bounds():
    q, k, v = tensors(heads_k=1)
    grouped, full = make_impl(num_kv_heads=1), make_impl()
    torch.testing.assert_close(grouped(q, k, v), full(q, *(x.expand_as(x.repeat(1, 1, 2, 1)) for x in (k, v))))


@pytest.mark.parametrize(("length_q", "length_k"), [(330, 70), (70, 330)])
def test_other_key_lengths_read_the_next_head(length_q, length_k):
    q, k, v = tensors(length_q, length_k)
    impl = make_impl(topk_ratio=0.5)
    out = impl(q, k, v)
    for head in range(2):
        alone = impl(*(x[:, :, head : head + 1].contiguous() for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, head : head + 1], alone)


def test_row_sums_of_the_backward_pass_are_rounded_to_bfloat16():
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 256, 2, 32, generator=generator).bfloat16() for _ in range(4))
    weight = torch.randn(32, 32, generator=generator)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x = [y.to(dtype) for y in (q, k, v)]
        _, state, mass, _ = summarize_keys(*x[1:], 64, "softmax")
        zeros = tuple(torch.zeros_like(y) for y in x)
        results.append(linear_backward(dout.to(dtype), *x, state, mass, weight, "softmax", zeros))
    for ours, exact in zip(*results, strict=True):
        # nothing but the result is rounded
        rounded = measure_error(exact.to(ours.dtype), exact).relative_l2
        assert measure_error(ours, exact).relative_l2 <= 2 * rounded + 32 * torch.finfo(torch.float32).eps


def test_scores_rounded_to_bfloat16_choose_other_blocks():
    q = torch.ones(1, 128, 1, 16, dtype=torch.bfloat16)
    k = torch.ones(1, 128, 1, 16, dtype=torch.bfloat16)
    # the second block scores higher by less than bfloat16 resolves
    k[:, 100] = 1.0078125
    assert select_blocks(q, k, topk_ratio=0.5).blocks.flatten().tolist() == [1]


def test_padding_of_the_last_block_pulls_its_mean_towards_zero():
    q = torch.ones(1, 64, 1, 16)
    k = torch.full((1, 80, 1, 16), 0.25)
    # over its 16 tokens the last block scores 2, over 64 it would score 0.5
    k[:, 64:] = 0.5
    assert select_blocks(q, k, topk_ratio=0.5).blocks.flatten().tolist() == [1]


def test_lists_are_in_no_order():
    q, k, _ = tensors(300, 3000)
    blocks = select_blocks(q, k, topk_ratio=0.4).blocks
    assert blocks.dtype == torch.int32
    assert (blocks.diff(dim=-1) > 0).all()


def test_a_constant_added_to_all_keys_changes_the_choice():
    q, k, _ = tensors(300, 1000)
    shifted = k + torch.linspace(-3, 3, 16, dtype=k.dtype)
    assert torch.equal(select_blocks(q, k).blocks, select_blocks(q, shifted).blocks)


def test_metadata_override_the_ratio_of_the_layer_by_a_default_of_their_own():
    q, k, v = tensors(200, 1000)
    impl = make_impl(topk_ratio=0.2)
    built = SLAAttentionMetadataBuilder().build(current_timestep=3)
    assert built == SLAAttentionMetadata(3)
    assert torch.equal(impl(q, k, v, built), impl(q, k, v))
    assert not torch.equal(impl(q, k, v, SLAAttentionMetadata(3, 0.5)), impl(q, k, v))


def test_keys_are_smoothed_in_place():
    q, k, v = tensors()
    before = [x.clone() for x in (q, k, v)]
    make_impl()(q, k, v)
    assert all(map(torch.equal, before, (q, k, v)))


def test_half_precision_overflows_on_large_values():
    q, k, v = tensors(300, 300, torch.float16)
    out = SLAAttentionImpl(2, 16, feature_map="elu", use_bf16=False)(64 * q, 64 * k, 1e4 * v.sign())
    assert out.isfinite().all()


def test_the_projection_of_a_trained_layer_is_kept_in_a_file_of_its_own():
    impl = make_impl()
    assert set(impl.state_dict()) == {"proj_l.weight", "proj_l.bias"}


def test_blocks_other_than_the_kernels_own_are_asserted():
    with pytest.raises(
        UnsupportedRequestError, match=r"BLKQ=96 is not known to SLA_ATTN; expected one of 64, 128, 256"
    ):
        SLAAttentionImpl(2, 16, BLKQ=96)


def test_autocast_changes_no_bit_forward_or_backward():
    q, k, v = (torch.randn(1, 256, 2, 32) for _ in range(3))
    impl = SLAAttentionImpl(2, 32, topk_ratio=0.3)
    torch.nn.init.normal_(impl.proj_l.weight)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = impl(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
