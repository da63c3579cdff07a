"""Parameters of backends inside models of diffusers: created, trained, saved, loaded."""

import warnings

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

from attnmux import AttentionMetadata, BackendSpec, Capabilities, UnsupportedRequestError
from attnmux.backends.sdpa import SDPAImpl
from attnmux.integrations.diffusers import apply
from attnmux.testing import installed, make_backend

VSA = {"backend": "VIDEO_SPARSE_ATTN", "metadata": {"VSA_sparsity": 0.5}}
SLA = {"backend": "SLA_ATTN", "impl_args": {"topk_ratio": 0.5}}
SLA_PROJECTION = "blocks.0.attn1.processor.attention.SLA_ATTN.attn_impl.proj_l.weight"
GATE = "blocks.0.attn1.processor.to_gate_compress.weight"
PROJECTION = "blocks.0.attn1.processor.attention.LEARNED_ATTN.attn_impl.proj_l.weight"


class LearnedImpl(SDPAImpl, nn.Module):
    """Dense attention plus a projection of itself, zero at first."""

    def __init__(self, num_heads, head_size, *args, **kwargs):
        nn.Module.__init__(self)
        SDPAImpl.__init__(self, num_heads, head_size, *args, **kwargs)
        self.proj_l = nn.Linear(head_size, head_size)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, query, key, value, attn_metadata: AttentionMetadata | None = None, *, attn_mask=None):
        output = SDPAImpl.forward(self, query, key, value, attn_metadata, attn_mask=attn_mask)
        return output + self.proj_l(output)


@pytest.fixture
def learned():
    capabilities = Capabilities(
        dtypes={"float32"},
        head_sizes={64},
        devices={"cpu"},
        backward=True,
        trainable_parameters=True,
        exactness="linear",
    )
    spec = BackendSpec("LEARNED_ATTN", target="made:Backend", capabilities=capabilities)
    with installed(spec, make_backend("LEARNED_ATTN", LearnedImpl)):
        yield {"backend": "LEARNED_ATTN"}


@pytest.fixture(params=["gate", "projection", "SLA"])
def parametric(request):
    """Arguments of apply for a backend that brings parameters, and the name of one of them."""
    if request.param == "gate":
        return VSA, GATE
    if request.param == "SLA":
        return SLA, SLA_PROJECTION
    return request.getfixturevalue("learned"), PROJECTION


def train(tiny, steps=2):
    optimizer = torch.optim.SGD(tiny.model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        tiny().square().mean().backward()
        optimizer.step()


def test_parameters_are_in_the_state_dict_and_said_to_be_initialised(make, parametric):
    options, name = parametric
    tiny = make()
    with apply(tiny.model, **options) as handle:
        assert name in tiny.model.state_dict()
        assert name in handle.initialised
        assert "parameters initialised: 6" in str(handle)
    assert name not in tiny.model.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("parametric", ["gate", "projection"], indirect=True)
def test_initial_parameters_leave_the_model_as_it_is(make, parametric):
    options, _ = parametric
    tiny = make()
    without = tiny()
    if options is VSA:
        with apply(tiny.model, **options):
            gated = tiny()
            # a gate that is not zero counts
            tiny.model.get_parameter(GATE).add_(0.1)
            assert not torch.equal(tiny(), gated)
    else:
        with apply(tiny.model, **options):
            assert torch.equal(tiny(), without)


def test_parameters_train(make, parametric):
    options, name = parametric
    tiny = make()
    with apply(tiny.model, **options):
        train(tiny)
        assert tiny.model.get_parameter(name).abs().max() > 0


def test_saved_parameters_come_back(make, parametric, tmp_path):
    options, name = parametric
    tiny = make()
    with apply(tiny.model, **options):
        train(tiny)
        tiny.model.save_pretrained(tmp_path)
        expected = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    again = make()
    again.model = WanTransformer3DModel.from_pretrained(tmp_path)
    with warnings.catch_warnings(), apply(again.model, **options, checkpoint=tmp_path) as handle:
        warnings.simplefilter("error")
        found = again.model.state_dict()
        assert found[name].abs().max() > 0
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        assert not handle.initialised
        assert "parameters loaded: 6" in str(handle)


def test_checkpoint_without_them_loads_and_says_what_was_initialised(make, parametric, tmp_path):
    options, name = parametric
    make().model.save_pretrained(tmp_path)
    tiny = make()
    with pytest.warns(UserWarning, match=rf"holds 0 of the 6 parameters.*{name}"):
        handle = apply(tiny.model, **options, checkpoint=tmp_path)
    assert len(handle.initialised) == 6


def test_names_of_models_with_the_layer_in_the_block_are_understood(make, tmp_path):
    values = {"blocks.0.to_gate_compress.weight": torch.full((128, 128), 0.5)}
    save_file(values, tmp_path / "gates.safetensors")
    tiny = make()
    with pytest.warns(UserWarning, match="holds 1 of the 6"):
        handle = apply(tiny.model, **VSA, checkpoint=tmp_path / "gates.safetensors")
    assert handle.loaded == (GATE,)
    assert torch.equal(tiny.model.get_parameter(GATE), next(iter(values.values())))


def test_wrong_checkpoints_are_refused_and_change_nothing(make, tmp_path):
    tiny = make()
    with pytest.raises(UnsupportedRequestError, match="neither a .safetensors file nor a folder"):
        apply(tiny.model, **VSA, checkpoint=tmp_path)
    save_file({GATE: torch.zeros(3, 3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UnsupportedRequestError, match=r"is \[3, 3\], and blocks.0.attn1 needs \[128, 128\]"):
        apply(tiny.model, **VSA, checkpoint=tmp_path)
    assert not tiny.model._forward_pre_hooks
    assert GATE not in tiny.model.state_dict()


def test_gate_is_in_the_models_dtype(make):
    tiny = make()
    tiny.model.to(torch.bfloat16)
    with apply(tiny.model, **VSA):
        assert {p.dtype for name, p in tiny.model.named_parameters() if "to_gate_compress" in name} == {torch.bfloat16}


def test_gate_is_for_self_attention_only(make):
    capabilities = Capabilities(
        dtypes={"float32"}, head_sizes={64}, devices={"cpu"}, cross_attention=True, extra_inputs={"gate_compress"}
    )
    spec = BackendSpec("GATED_ATTN", target="made:Backend", capabilities=capabilities)
    tiny = make()
    with installed(spec, make_backend("GATED_ATTN")), apply(tiny.model, "GATED_ATTN", modules="all") as handle:
        assert {name.split(".")[2] for name in handle.initialised} == {"attn1"}


def test_saved_file_holds_the_models_own_parameters_too(make, tmp_path):
    tiny = make()
    own = set(tiny.model.state_dict())
    with apply(tiny.model, **VSA):
        tiny.model.save_pretrained(tmp_path)
    assert own < set(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
