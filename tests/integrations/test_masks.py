"""Masks of a model: they reach the backend, or are refused, or are said to hide nothing and held to it."""

import copy

import pytest
import torch

from attnmux import UnsupportedRequestError
from attnmux.integrations.diffusers import apply
from attnmux.testing import assert_close_to_oracle

DENSE_SLA = {"backend": "SLA_ATTN", "impl_args": {"topk_ratio": 1.0}}
FULL = {"assume_full_masks": True}


@pytest.fixture
def padded(make):
    return make("hunyuan_video")


@pytest.fixture
def whole(make):
    """HunyuanVideo and a text without padding, for which the model makes masks that are all true."""
    tiny = make("hunyuan_video")
    tiny.arguments["encoder_attention_mask"] = torch.ones(1, 9, dtype=torch.bool)
    return tiny


@torch.no_grad()
def test_mask_reaches_the_backend(padded, whole):
    own = padded()
    with apply(padded.model, "TORCH_SDPA"):
        masked = padded()
    assert (whole() - own).abs().max() > 1000 * (masked - own).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["SLA_ATTN", "WINDOW_ATTN"])
def test_backend_without_masks_refuses_one_and_says_what_may_be_said(whole, backend):
    with (
        apply(whole.model, backend),
        pytest.raises(UnsupportedRequestError, match=r"say apply\(assume_full_masks=True\)"),
    ):
        whole()


@pytest.mark.parametrize("options", [{"backend": "TORCH_SDPA", "modules": "all"}, DENSE_SLA], ids=["SDPA", "SLA"])
def test_full_masks_are_left_out(whole, options):
    own, oracle = whole.denoise(), copy.deepcopy(whole).double().denoise()
    with apply(whole.model, **options, **FULL):
        assert_close_to_oracle(whole.denoise(), oracle, own)


def test_gradients_without_full_masks_equal_the_models_own(whole):
    own, oracle = whole.gradients(), copy.deepcopy(whole).double().gradients()
    with apply(whole.model, **DENSE_SLA, **FULL):
        ours = whole.gradients()
        # an untrained projection of zeros is the one parameter that the model has not
        assert {name.rpartition(".attn_impl.")[2].partition(".")[0] for name in ours.keys() - own.keys()} == {"proj_l"}
    largest = max(float(value.abs().max()) for value in oracle.values())
    for name, value in own.items():
        assert_close_to_oracle(ours[name], oracle[name], value, kind="gradient", what=name, term_size=largest)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["SLA_ATTN", "TORCH_SDPA"])
def test_mask_that_is_said_to_be_full_and_is_not_raises(padded, backend):
    with apply(padded.model, backend, **FULL), pytest.raises(UnsupportedRequestError, match="a mask that hides keys"):
        padded()


@torch.no_grad()
def test_compiled_blocks_hold_masks_to_it_as_well(whole, compiled_afresh):
    with apply(whole.model, **DENSE_SLA, **FULL):
        expected = whole()
        whole.model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert torch.allclose(whole(), expected, atol=10 * torch.finfo(torch.float32).eps * float(expected.abs().max()))
        whole.arguments["encoder_attention_mask"] = torch.arange(9)[None] < 6
        with pytest.raises(RuntimeError, match="a mask that hides keys"):
            whole()


@torch.no_grad()
@pytest.mark.parametrize("hides", [False, True])
def test_additive_mask_of_zeros_is_full(make, hides):
    mask = torch.zeros(1, 1, 1, 5)
    mask[..., -1] = float("-inf") if hides else 0.0
    q, k, v = torch.randn(3, 1, 5, 2, 64)
    tiny = make()
    with apply(tiny.model, "SLA_ATTN", impl_args={"topk_ratio": 1.0}, **FULL):
        attend = tiny.model.blocks[0].attn1.processor.attend
        plain = attend(q, k, v, None, None, 0.0, is_causal=False, scale=None)
        if hides:
            with pytest.raises(UnsupportedRequestError, match="a mask that hides keys"):
                attend(q, k, v, None, mask, 0.0, is_causal=False, scale=None)
        else:
            assert torch.equal(attend(q, k, v, None, mask, 0.0, is_causal=False, scale=None), plain)
