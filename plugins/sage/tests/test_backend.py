import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from sage_scenarios import Scenario, make_tensors

import attnmux_sage
from attnmux import LocalAttention
from attnmux.backend import REQUIRED_METHODS, AttentionBackend, AttentionMetadata
from attnmux.errors import UnsupportedRequestError
from attnmux.selector import select_backend
from attnmux.spec import AttentionRequest
from attnmux.testing import conformance_class
from attnmux_sage import (
    SageAttentionBackend,
    SageAttentionImpl,
    SageSLAAttentionBackend,
    SageSLAAttentionImpl,
    sage_attention,
)
from attnmux_sage.plugin import SAGE_ATTN, SAGE_SLA_ATTN
from attnmux_sla import AlphaMix, SLAAttentionImpl, SLAAttentionMetadata, SLAAttentionMetadataBuilder, TopkRule

SCENARIO = Scenario(len_q=300, len_k=500, dtype=torch.float32, head_size=32)
BACKENDS = {"SAGE_ATTN": (SAGE_ATTN, SageAttentionBackend), "SAGE_SLA_ATTN": (SAGE_SLA_ATTN, SageSLAAttentionBackend)}


def trained(cls=SageSLAAttentionImpl, **options):
    """A layer whose parameters are not those it starts with."""
    impl = cls(2, 32, **options)
    generator = torch.Generator().manual_seed(4)
    for parameter in impl.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return impl


class TestSpecs:
    @pytest.mark.parametrize("name", BACKENDS)
    def test_entry_point_is_the_spec_and_its_target_the_backend(self, name):
        spec, backend = BACKENDS[name]
        (entry,) = entry_points(group="attnmux.backends", name=name)
        assert entry.load() is spec
        module, _, attribute = spec.target.partition(":")
        assert getattr(__import__(module, fromlist=[attribute]), attribute) is backend
        assert backend.get_name() == name == spec.name

    @pytest.mark.parametrize("name", BACKENDS)
    def test_capabilities_promise_neither_exactness_nor_gradients(self, name):
        capabilities = BACKENDS[name][0].capabilities
        assert capabilities.exactness == "quantized"
        assert not (capabilities.backward or capabilities.masks or capabilities.extra_inputs)

    def test_reading_the_specs_loads_no_torch(self):
        code = "import sys, attnmux_sage.plugin, attnmux_sage; dir(attnmux_sage); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_training_is_refused_at_selection(self):
        request = AttentionRequest(head_size=64, dtype="float32", device="cpu", needs_backward=True)
        with pytest.raises(UnsupportedRequestError, match="gradients"):
            select_backend(request, backend="SAGE_ATTN")

    def test_it_is_never_chosen_automatically(self):
        request = AttentionRequest(head_size=64, dtype="float32", device="cpu")
        assert select_backend(request).spec.name not in BACKENDS


class TestPackage:
    def test_public_names_are_there_and_sorted(self):
        assert attnmux_sage.__all__ == sorted(attnmux_sage.__all__)
        assert {name for name in attnmux_sage.__all__ if getattr(attnmux_sage, name, None) is None} == set()
        assert set(attnmux_sage.__all__) <= set(dir(attnmux_sage))

    def test_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="module 'attnmux_sage' has no attribute 'sageattn3'"):
            attnmux_sage.sageattn3  # noqa: B018

    @pytest.mark.parametrize("name", BACKENDS)
    def test_backend_has_every_required_method(self, name):
        backend = BACKENDS[name][1]
        assert issubclass(backend, AttentionBackend)
        assert set(REQUIRED_METHODS) <= set(vars(backend))
        assert conformance_class(name) is backend.get_conformance_cls()

    def test_sla_layers_take_the_metadata_of_sla(self):
        assert SageSLAAttentionBackend.get_metadata_cls() is SLAAttentionMetadata
        assert SageSLAAttentionBackend.get_builder_cls() is SLAAttentionMetadataBuilder
        assert SageAttentionBackend.get_metadata_cls() is AttentionMetadata

    @pytest.mark.parametrize("name", BACKENDS)
    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"device": "cpu", "dtype": "float32"}, "emulates the kernels' arithmetic in plain PyTorch"),
            ({"device": "cuda", "dtype": "float32"}, "the kernels take bfloat16 and float16"),
            ({"device": "cuda", "dtype": "bfloat16"}, "hopper, triton, reference"),
        ],
    )
    def test_engine_is_described(self, name, fields, text):
        assert text in BACKENDS[name][1].describe_engine(AttentionRequest(head_size=64, **fields))


class TestSage:
    @pytest.mark.parametrize("pv", [None, "fp8", "bf16"])
    def test_options_reach_the_operator(self, pv):
        q, k, v = make_tensors(SCENARIO)
        impl = SageAttentionImpl(2, 32, softmax_scale=0.4, causal=True, pv=pv, engine="reference")
        out, lse = impl.forward(q, k, v, AttentionMetadata(3), return_lse=True)
        wanted = sage_attention(q, k, v, softmax_scale=0.4, causal=True, pv=pv, return_lse=True)
        assert torch.equal(out, wanted[0])
        assert torch.equal(lse, wanted[1])

    def test_layer_finds_it_by_its_alias(self):
        q, k, v = make_tensors(SCENARIO)
        layer = LocalAttention(2, 32, backend="sage", dtype=torch.float32, pv="bf16")
        assert layer.backend_name == "SAGE_ATTN"
        assert torch.equal(layer(q, k, v), sage_attention(q, k, v, pv="bf16"))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"pv": "int8"}, "pv='int8' is not known to SAGE_ATTN; expected None or one of fp8, bf16"),
            ({"engine": "cuda"}, "engine='cuda' is not known to SAGE_ATTN"),
            ({"head_size": 256}, "SAGE_ATTN takes head sizes 16 to 128 in steps of 8, got head_size=256"),
        ],
    )
    def test_unknown_options_are_refused(self, options, text):
        with pytest.raises(UnsupportedRequestError, match=text):
            SageAttentionImpl(**{"num_heads": 2, "head_size": 32, **options})

    def test_another_head_size_than_the_layers_is_refused(self):
        with pytest.raises(
            UnsupportedRequestError, match="query has head_dim=32, but this layer was built with head_size=64"
        ):
            SageAttentionImpl(2, 64).forward(*make_tensors(SCENARIO))


class TestSageSLA:
    def test_state_dict_is_that_of_sla(self):
        sla = trained(SLAAttentionImpl)
        impl = SageSLAAttentionImpl(2, 32)
        impl.load_state_dict(sla.state_dict(), strict=True)
        assert torch.equal(impl.proj_l.weight, sla.proj_l.weight)
        assert set(impl.state_dict()) == {"proj_l.weight", "proj_l.bias"}

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"linear_keys": "complement"},
            {"linear_keys": "marginal", "negligible_ratio": 0.3},
            {"feature_map": "relu"},
            {"router": "learned", "combine": "alpha", "linear_keys": "complement"},
            {"softmax_scale": 0.5},
        ],
    )
    def test_every_variant_of_sla_is_close_to_sla(self, options):
        q, k, v = make_tensors(SCENARIO)
        impl, sla = (trained(cls, topk_ratio=0.4, **options) for cls in (SageSLAAttentionImpl, SLAAttentionImpl))
        with torch.no_grad():
            out, wanted = impl(q, k, v), sla(q, k, v)
        assert not torch.equal(out, wanted)
        assert (out - wanted).norm() / wanted.norm() < 0.05

    def test_half_of_the_blocks_are_kept_by_default(self):
        q, k, v = make_tensors(SCENARIO)
        assert torch.equal(trained()(q, k, v), trained(topk_ratio=0.5)(q, k, v))

    def test_schedules_and_protected_tokens_reach_the_choice(self):
        q, k, v = make_tensors(SCENARIO.but(len_k=900))
        impl = trained(prefix="blocks.1.attn", topk_ratio=0.2)
        rules = SLAAttentionMetadata(0, 0.4, (TopkRule(0.8, layers=(0, 2)),))
        assert torch.equal(impl(q, k, v, rules), trained(topk_ratio=0.8)(q, k, v))
        protected = impl(q, k, v, SLAAttentionMetadata(0, protected_tokens=100))
        assert not torch.equal(protected, impl(q, k, v))

    @pytest.mark.parametrize("pv", ["fp8", "bf16"])
    def test_pv_reaches_the_sparse_branch(self, pv):
        q, k, v = make_tensors(SCENARIO)
        outs = [trained(pv=x)(q, k, v) for x in (pv, "fp8")]
        assert torch.equal(*outs) == (pv == "fp8")

    def test_parameters_do_not_ask_for_gradients(self):
        assert not any(x.requires_grad for x in trained(router="learned", combine=AlphaMix(32)).parameters())

    def test_engine_is_handed_on(self):
        q, k, v = make_tensors(SCENARIO)
        assert torch.equal(trained(engine="reference")(q, k, v), trained()(q, k, v))
        with pytest.raises(UnsupportedRequestError, match="engine 'hopper' cannot run this call: q is on 'cpu'"):
            trained(engine="hopper")(q, k, v)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"BLKQ": 64, "BLKK": 128}, "SAGE_SLA_ATTN takes BLKQ=128 and BLKK=64, got BLKQ=64 and BLKK=128"),
            ({"head_size": 256}, "SAGE_SLA_ATTN takes head sizes 16 to 128 in steps of 16, got head_size=256"),
            ({"causal": True}, "SAGE_SLA_ATTN cannot run causal=True"),
            ({"feature_map": "gelu"}, "feature_map='gelu' is not known to SAGE_SLA_ATTN"),
            ({"pv": "int8"}, "pv='int8' is not known to SAGE_SLA_ATTN"),
            ({"engine": "cuda"}, "engine='cuda' is not known to SAGE_SLA_ATTN"),
            ({"BLOCK": 3}, "does not know the argument BLOCK"),
        ],
    )
    def test_unknown_options_are_refused(self, options, text):
        with pytest.raises(UnsupportedRequestError, match=text):
            SageSLAAttentionImpl(**{"num_heads": 2, "head_size": 32, **options})

    def test_other_metadata_are_refused(self):
        with pytest.raises(
            UnsupportedRequestError, match="SAGE_SLA_ATTN needs SLAAttentionMetadata or None, got Attention"
        ):
            trained()(*make_tensors(SCENARIO), AttentionMetadata(0))
