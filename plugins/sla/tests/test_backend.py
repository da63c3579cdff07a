import io
import pickle
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

import attnmux_sla
from attnmux.backend import REQUIRED_METHODS, AttentionBackend, AttentionImpl, AttentionMetadata
from attnmux.errors import UnsupportedRequestError
from attnmux.layers import LocalAttention
from attnmux.spec import AttentionRequest
from attnmux.testing import conformance_class
from attnmux_sla import (
    AlphaMix,
    SLAAttentionBackend,
    SLAAttentionImpl,
    SLAAttentionMetadata,
    SLAAttentionMetadataBuilder,
    TopkRule,
    sparse_linear_attention,
)
from attnmux_sla.plugin import SPEC


def tensor(B=1, S=300, H=2, D=16, dtype=torch.float32):
    return torch.randn(B, S, H, D, generator=torch.Generator().manual_seed(B + S + H + D)).to(dtype)


def trained(**options):
    """A layer whose parameters are not those it starts with."""
    impl = SLAAttentionImpl(2, 16, **options)
    generator = torch.Generator().manual_seed(4)
    for parameter in impl.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return impl


class TestSpec:
    def test_entry_point_is_the_spec(self):
        (entry,) = entry_points(group="attnmux.backends", name="SLA_ATTN")
        assert entry.load() is SPEC
        assert SPEC.aliases == ("SLA",)

    def test_target_is_the_backend(self):
        module, _, name = SPEC.target.partition(":")
        assert getattr(__import__(module, fromlist=[name]), name) is SLAAttentionBackend

    def test_capabilities_promise_no_exactness_and_no_masks(self):
        capabilities = SPEC.capabilities
        assert capabilities.exactness == "sparse"
        assert capabilities.trainable_parameters
        assert not (capabilities.masks or capabilities.causal or capabilities.returns_lse or capabilities.extra_inputs)

    def test_reading_the_spec_loads_no_torch(self):
        code = "import sys, attnmux_sla.plugin, attnmux_sla; dir(attnmux_sla); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestPackage:
    def test_public_names_are_there_and_sorted(self):
        assert attnmux_sla.__all__ == sorted(attnmux_sla.__all__)
        assert {name for name in attnmux_sla.__all__ if getattr(attnmux_sla, name, None) is None} == set()
        assert set(attnmux_sla.__all__) <= set(dir(attnmux_sla))

    def test_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="module 'attnmux_sla' has no attribute 'flex_attention'"):
            attnmux_sla.flex_attention  # noqa: B018

    def test_backend_has_every_required_method(self):
        assert issubclass(SLAAttentionBackend, AttentionBackend)
        assert set(REQUIRED_METHODS) <= set(vars(SLAAttentionBackend))
        assert SLAAttentionBackend.get_metadata_cls() is SLAAttentionMetadata
        assert SLAAttentionBackend.get_builder_cls() is SLAAttentionMetadataBuilder
        assert issubclass(SLAAttentionBackend.get_impl_cls(), (AttentionImpl, torch.nn.Module))

    def test_check_command_finds_the_conformance_class(self):
        assert conformance_class("SLA") is SLAAttentionBackend.get_conformance_cls()

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"device": "cpu", "dtype": "float32"}, "reference, plain PyTorch"),
            ({"device": "cuda", "dtype": "float32"}, "the kernels take bfloat16 and float16"),
            ({"device": "cuda", "dtype": "bfloat16", "head_size": 256}, "kernels take head sizes up to 128"),
            ({"device": "cuda", "dtype": "bfloat16"}, "linear branch in triton"),
        ],
    )
    def test_engine_is_described(self, fields, text):
        assert text in SLAAttentionBackend.describe_engine(AttentionRequest(**{"head_size": 128, **fields}))


class TestMetadata:
    def test_timestep_is_the_first_field_and_the_ratio_the_second(self):
        assert SLAAttentionMetadata(3, 0.2).asdict_zerocopy() == {
            "current_timestep": 3,
            "topk_ratio": 0.2,
            "rules": (),
            "protected_tokens": 0,
        }
        assert issubclass(SLAAttentionMetadata, AttentionMetadata)

    def test_builder_keeps_the_rules_of_the_step(self):
        early, always = TopkRule(0.5, steps=(0, 4)), TopkRule(0.3, layers=(0, 1))
        builder = SLAAttentionMetadataBuilder()
        builder.prepare()
        assert builder.build(4, 0.1, schedule=[early, always]).rules == (early, always)
        assert builder.build(5, 0.1, schedule=[early, always]).rules == (always,)

    def test_pickle_gives_the_same_metadata(self):
        metadata = SLAAttentionMetadata(3, None, (TopkRule(0.5, layers=(0, 1)),), 7)
        assert pickle.loads(pickle.dumps(metadata)) == metadata

    def test_unknown_argument_is_refused_by_name(self):
        with pytest.raises(
            UnsupportedRequestError, match="build does not know the argument sparsity; it takes current"
        ):
            SLAAttentionMetadataBuilder().build(0, sparsity=0.9)

    @pytest.mark.parametrize("ratio", [0.0, 1.5, float("nan")])
    def test_ratio_out_of_range_is_refused(self, ratio):
        with pytest.raises(
            UnsupportedRequestError, match=r"topk_ratio must be a fraction of the key blocks in \(0, 1\]"
        ):
            SLAAttentionMetadata(0, ratio)

    def test_negative_protected_tokens_are_refused(self):
        with pytest.raises(UnsupportedRequestError, match="protected_tokens must be >= 0, got -1"):
            SLAAttentionMetadata(0, protected_tokens=-1)


class TestSchedule:
    @pytest.mark.parametrize(
        ("prefix", "layer_idx", "ratio"),
        [
            ("blocks.1.attn", None, 0.8),
            ("model.blocks.4.attn1", None, 0.4),
            ("myblocks.1.attn", None, 0.4),
            ("", 0, 0.8),
            ("blocks.1", 5, 0.4),
            ("", None, 0.4),
        ],
    )
    def test_the_first_rule_of_the_layer_wins(self, prefix, layer_idx, ratio):
        q, k, v = tensor(), tensor(S=900), tensor(S=900) + 1
        metadata = SLAAttentionMetadata(0, 0.4, (TopkRule(0.8, layers=(0, 2)), TopkRule(0.2, layers=(0, 2))))
        impl = trained(prefix=prefix, layer_idx=layer_idx)
        assert torch.equal(impl(q, k, v, metadata), trained(topk_ratio=ratio)(q, k, v))

    def test_protected_tokens_reach_the_operator(self):
        q, k, v = tensor(), tensor(S=900), tensor(S=900) + 1
        impl = trained(topk_ratio=0.2)
        out = impl(q, k, v, SLAAttentionMetadata(0, protected_tokens=100))
        expected = sparse_linear_attention(
            q, k, v, impl.proj_l.weight, impl.proj_l.bias, topk_ratio=0.2, protected_tokens=100
        )
        assert torch.equal(out, expected)
        assert not torch.equal(out, impl(q, k, v))


class TestImpl:
    def test_parameters_are_zero_float32_and_named_as_published(self):
        state = SLAAttentionImpl(2, 16).state_dict()
        assert {name: (x.dtype, tuple(x.shape)) for name, x in state.items()} == {
            "proj_l.weight": (torch.float32, (16, 16)),
            "proj_l.bias": (torch.float32, (16,)),
        }
        assert not any(x.any() for x in state.values())

    def test_positional_arguments_are_in_the_published_order(self):
        impl = SLAAttentionImpl(4, 16, False, 0.3, 2, "blocks.7.attn", 0.2, "elu", 64, 128, False)
        assert (impl.num_kv_heads, impl.softmax_scale, impl.layer_idx, impl.topk_ratio) == (2, 0.3, 7, 0.2)
        assert (impl.feature_map, impl.block_q, impl.block_k, impl.half_dtype) == ("elu", 64, 128, torch.float16)

    def test_checkpoint_comes_back_in_a_layer(self):
        options = {"backend": "SLA_ATTN", "dtype": torch.float32}
        layer, other = (LocalAttention(2, 16, **options) for _ in range(2))
        layer.attn_impl.load_state_dict(trained().state_dict())
        assert set(layer.state_dict()) == {"attn_impl.proj_l.weight", "attn_impl.proj_l.bias"}
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        q, k, v = tensor(), tensor() + 1, tensor() * 2
        assert torch.equal(layer(q, k, v), other(q, k, v))
        assert not torch.equal(layer(q, k, v), LocalAttention(2, 16, **options)(q, k, v))

    def test_a_model_in_bfloat16_has_a_rounded_projection_and_gradients_in_its_dtype(self):
        impl, rounded = trained().to(torch.bfloat16), trained()
        rounded.load_state_dict({name: x.float() for name, x in impl.state_dict().items()})
        q, k, v = (x.bfloat16() for x in (tensor(), tensor() + 1, tensor() * 2))
        out = impl(q, k, v)
        assert torch.equal(out, rounded(q, k, v))
        out.sum().backward()
        assert impl.proj_l.weight.grad.dtype == torch.bfloat16

    @pytest.mark.parametrize("options", [{}, {"linear_keys": "complement"}, {"router": "learned", "combine": "alpha"}])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_changes_nothing(self, options, dtype):
        impl = trained(**options)
        q, k, v = (x.to(dtype) for x in (tensor(), tensor() + 1, tensor() * 2))
        expected = impl(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(impl(q, k, v), expected)

    def test_half_inputs_keep_their_dtype_on_a_cpu(self):
        q = tensor(dtype=torch.float16)
        assert torch.equal(trained(use_bf16=True)(q, q, q), trained(use_bf16=False)(q, q, q))

    def test_sla2_is_a_configuration(self):
        impl = trained(linear_keys="complement", router="learned", combine="alpha")
        assert impl.proj_l is None
        assert set(impl.state_dict()) == {
            "router.proj_q.weight", "router.proj_k.weight", "combine.ratio.weight", "combine.ratio.bias",
        }  # fmt: skip
        assert impl(tensor(), tensor(), tensor()).isfinite().all()

    def test_parts_may_be_modules_of_the_callers_own(self):
        mix = AlphaMix(16)
        assert SLAAttentionImpl(2, 16, combine=mix).combine is mix

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"attn_mask": 1}, "SLAAttentionImpl does not know the argument attn_mask"),
            ({"topk_ratio": 0}, r"topk_ratio must be a fraction of the key blocks in \(0, 1\], got 0"),
            (
                {"feature_map": "hedgehog"},
                "feature_map='hedgehog' is not known to SLA_ATTN; expected one of softmax, elu, relu",
            ),
            (
                {"linear_keys": "some"},
                "linear_keys='some' is not known to SLA_ATTN; expected one of all, complement, marginal",
            ),
            ({"BLKK": 32}, "BLKK=32 is not known to SLA_ATTN; expected one of 64, 128, 256"),
            ({"engine": "cuda"}, "engine='cuda' is not known to SLA_ATTN; expected one of None, reference, triton"),
            ({"negligible_ratio": 1.5}, r"negligible_ratio must be in \[0, 1\], got 1.5"),
            ({"router": "best"}, "router='best' is not known to SLA_ATTN; expected a module or one of mean, learned"),
            (
                {"combine": "best"},
                "combine='best' is not known to SLA_ATTN; expected a module or one of project, alpha",
            ),
        ],
    )
    def test_unknown_options_are_refused_by_name(self, options, text):
        with pytest.raises(UnsupportedRequestError, match=text):
            SLAAttentionImpl(2, 16, **options)

    def test_head_size_is_refused_with_those_that_work(self):
        with pytest.raises(UnsupportedRequestError, match="head sizes 16 to 256 in steps of 16, got head_size=72"):
            SLAAttentionImpl(2, 72)

    def test_metadata_of_another_backend_are_refused_by_type(self):
        with pytest.raises(UnsupportedRequestError, match="needs SLAAttentionMetadata or None, got AttentionMetadata"):
            trained()(tensor(), tensor(), tensor(), AttentionMetadata(0))

    def test_another_head_size_than_the_layers_is_refused(self):
        with pytest.raises(UnsupportedRequestError, match="head_dim=32, but this layer was built with head_size=16"):
            trained()(*(tensor(D=32),) * 3)

    def test_integers_are_refused(self):
        with pytest.raises(UnsupportedRequestError, match="query has dtype torch.int32; supported: torch.float16"):
            trained()(*(tensor().int(),) * 3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"engine": "cuda"}, "engine='cuda' is not known; engines are reference, triton"),
        ({"engine": "triton"}, r"engine 'triton' cannot run this call: .*q is on 'cpu'; an NVIDIA GPU is needed"),
        ({"block_q": 32}, "block_q=32 is not supported; block sizes are 64, 128 and 256"),
        ({"feature_map": "exp"}, "feature_map='exp' is not known; expected one of softmax, elu, relu"),
        ({"linear_keys": "none"}, "linear_keys='none' is not known; expected one of all, complement, marginal"),
        ({"topk_ratio": 1.5}, r"topk_ratio must be a fraction of the key blocks in \(0, 1\], got 1.5"),
        ({"negligible_ratio": -1}, r"negligible_ratio must be in \[0, 1\], got -1"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
        ({"protected_tokens": 301}, r"protected_tokens must be in \[0, 300\], the tokens of k, got 301"),
        ({"q": torch.zeros(300, 2, 16)}, r"q must have 4 dimensions, got shape \(300, 2, 16\)"),
        ({"q": tensor(S=0)}, r"q is empty: shape \(1, 0, 2, 16\)"),
        ({"k": tensor(dtype=torch.float64)}, "k is torch.float64 on cpu, q is torch.float32 on cpu"),
        ({"v": tensor().to("meta")}, "v is torch.float32 on meta, q is torch.float32 on cpu"),
        ({"v": tensor(S=200)}, r"k and v must have one shape, got \(1, 300, 2, 16\) and \(1, 200, 2, 16\)"),
        ({"k": tensor(B=2), "v": tensor(B=2)}, "must have the batch and head size of q, 1 and 16, got 2 and 16"),
        ({"k": tensor(H=3), "v": tensor(H=3)}, "q has 2 heads and k has 3; H must be a multiple of H_kv"),
        ({"v": tensor(S=16, D=300).transpose(1, 3)}, "the last dimension of v must be contiguous"),
        (
            {"proj_weight": torch.zeros(16, 8)},
            r"proj_weight must be floating point \(16, 16\), got torch.float32 \(16, 8\)",
        ),
        ({"proj_bias": torch.zeros(16, device="meta")}, "proj_bias is on meta and q on cpu; move them to one device"),
        ({"proj_bias": torch.zeros(16), "combine": AlphaMix(16)}, "proj_bias is given together with combine"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_numbers(change, text):
    call = {"q": tensor(), "k": tensor(), "v": tensor(), **change}
    with pytest.raises(UnsupportedRequestError, match=text):
        sparse_linear_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
