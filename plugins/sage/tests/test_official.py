"""The adapter of the official packages, with stand-ins that have their public signatures."""

import sys
import types

import pytest
import torch
from sage_scenarios import Scenario, make_lists, make_tensors

from attnmux.errors import UnsupportedRequestError
from attnmux.testing import dense_attention_oracle
from attnmux_blocksparse import BlockIndex
from attnmux_sage import sage_attention
from attnmux_sage.kernels import KernelRequest, is_supported, official

SCENARIO = Scenario(len_q=256, len_k=256, dtype=torch.bfloat16)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD"
    assert not kwargs
    out, lse = dense_attention_oracle(q, k, v, softmax_scale=sm_scale, causal=is_causal, return_lse=True)
    return (out.to(q.dtype), lse.float()) if return_lse else out.to(q.dtype)


def block_sparse_sage2_attn_cuda(
    q, k, v, mask_id=None, dropout_p=0.0, scale=None, smooth_k=True, pvthreshd=50, attention_sink=False,
    tensor_layout="HND", output_dtype=torch.float16, return_sparsity=False,
):  # fmt: skip
    assert mask_id.dtype == torch.int8
    assert mask_id.is_contiguous()
    v = v.to(torch.float16)
    visible = mask_id.bool().repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, : q.shape[2], : k.shape[2]]
    rows = (x.transpose(1, 2) for x in (q, k, v))
    out = dense_attention_oracle(*rows, softmax_scale=scale, attn_mask=visible)
    # what the kernels leave in an empty row is anything
    return torch.where(visible.any(-1)[..., None], out.transpose(1, 2), float("nan")).to(q.dtype)


@pytest.fixture
def installed(monkeypatch):
    """Stand-ins for both packages, on a card that both have kernels for."""
    packages = {
        "sageattention": {"sageattn": sageattn},
        "spas_sage_attn": {"block_sparse_sage2_attn_cuda": block_sparse_sage2_attn_cuda},
    }
    for name, functions in packages.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(official, "find_spec", lambda name: object() if name in packages else None)
    monkeypatch.setattr(official, "_installed_version", lambda name: "2.2.0")
    monkeypatch.setattr(official, "device_capability", lambda x: (8, 9))
    official._check.cache_clear()
    yield sys.modules
    official._check.cache_clear()


def reasons(scenario=SCENARIO, **options):
    return is_supported("official", KernelRequest(*make_tensors(scenario), **{"pv": "fp8", **options}))


def test_what_is_not_installed_is_named_with_its_source():
    (first, *_) = reasons()
    assert "sageattention is not installed (build github.com/thu-ml/SageAttention" in str(first)
    (first, *_) = reasons(has_lists=True)
    assert "spas_sage_attn is not installed (build github.com/thu-ml/SpargeAttn" in str(first)


@pytest.mark.parametrize(("version", "text"), [("1.0.6", "1.0.6"), ("", "of unknown version")])
def test_the_version_on_the_package_index_is_refused(installed, monkeypatch, version, text):
    monkeypatch.setattr(official, "_installed_version", lambda name: version)
    assert [str(x) for x in reasons()] == [f"sageattention {text}; at least 2.2 is needed"]


def test_dense_calls_run_with_scale_causal_and_lse(installed):
    scenario = SCENARIO.but(heads=4)
    q, k, v = make_tensors(scenario)
    out, lse = sage_attention(q, k, v, softmax_scale=0.3, causal=True, return_lse=True, engine="official")
    wanted, wanted_lse = dense_attention_oracle(q, k, v, softmax_scale=0.3, causal=True, return_lse=True)
    assert torch.equal(out, wanted.bfloat16())
    assert torch.equal(lse, wanted_lse.float())


def test_lists_run_and_their_empty_rows_are_zero(installed):
    scenario = SCENARIO.but(is_listed=True)
    q, k, v = make_tensors(scenario)
    blocks, counts = make_lists(scenario)
    index = BlockIndex(blocks, counts, num_key_blocks=4, block_q=128, block_k=64)
    # float16, in which the package multiplies, ends at 65504
    out = sage_attention(q, k, 1e5 * v, index=index, softmax_scale=0.2, engine="official")
    wanted = sage_attention(q, k, 1e5 * v, index=index, softmax_scale=0.2, engine="reference").float()
    assert (counts[:, :, -1] == 0).all()
    assert not out[:, 128:].any()
    assert (out.float() - wanted).norm() / wanted.norm() < official.ERROR_ALLOWED


def test_a_package_that_is_wrong_is_refused(installed):
    installed["sageattention"].sageattn = lambda q, k, v, **options: (torch.zeros_like(q), torch.zeros(1))
    assert "self_check" in [x.code for x in reasons()]
    with pytest.raises(
        UnsupportedRequestError, match=r"sageattention is off by 1 \(relative L2\) on a small call, allowed 0.08"
    ):
        sage_attention(*make_tensors(SCENARIO), engine="official")


def test_a_package_that_returns_nan_is_refused(installed):
    installed["sageattention"].sageattn = lambda q, k, v, **options: (q * float("nan"), torch.zeros(1))
    assert "sageattention is off by nan" in str(reasons()[0])


def test_a_package_that_changes_its_inputs_is_refused(installed):
    def mutating(q, k, v, **options):
        result = sageattn(q, k, v, **options)
        k -= k.mean(1, keepdim=True)
        return result

    installed["sageattention"].sageattn = mutating
    assert "sageattention changes its inputs" in str(reasons()[0])


def test_a_package_that_raises_is_refused(installed):
    del installed["sageattention"].sageattn
    assert "sageattention raised AttributeError" in str(reasons()[0])


def test_the_check_runs_once(installed):
    calls = []

    def counted(*tensors, **options):
        calls.append(tensors)
        return sageattn(*tensors, **options)

    installed["sageattention"].sageattn = counted
    assert reasons() == reasons() == []
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({}, {"pv": "bf16"}, "pv='bf16'; supported: 'fp8'"),
        ({}, {"softmax_scale": -0.1}, "softmax_scale=-0.1; a positive scale is needed"),
        ({"len_k": 100}, {"causal": True}, "S_q=256, S_k=100: causal attention needs one length"),
        ({"len_k": 100}, {"has_lists": True}, "S_q=256, S_k=100: block-sparse attention needs one length"),
        ({"len_q": 64, "len_k": 64}, {"has_lists": True}, "S_q=64, S_k=64: at least 128 are needed"),
        ({"heads": 4}, {"has_lists": True}, "4 query heads over 2 key heads"),
        ({"head_size": 32}, {"has_lists": True}, "head_dim=32; supported: 64, 128"),
        ({}, {"has_lists": True, "needs_lse": True}, "the log-sum-exp is not returned"),
        ({"dtype": torch.float32}, {}, "q is torch.float32; supported: bfloat16, float16"),
    ],
)
def test_what_the_packages_cannot_do_is_a_reason(installed, change, options, text):
    assert text in "; ".join(map(str, reasons(SCENARIO.but(**change), **options)))


@pytest.mark.parametrize(
    ("capability", "has_lists", "text"),
    [
        ((8, 0), False, r"compute capability (8, 0); supported: (8, 9), (9, 0), (12, 0)"),
        ((9, 0), True, r"compute capability (9, 0); its blocks are 64 x 128 there; supported"),
        (None, False, "an NVIDIA GPU is needed"),
    ],
)
def test_other_cards_are_a_reason(installed, monkeypatch, capability, has_lists, text):
    monkeypatch.setattr(official, "device_capability", lambda x: capability)
    assert text in "; ".join(map(str, reasons(has_lists=has_lists)))
