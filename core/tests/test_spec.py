"""Requests, capabilities and specs as data."""

import json

import pytest

from attnmux import (
    AttentionBackendEnum,
    AttentionRequest,
    BackendSpec,
    Capabilities,
    Reason,
    UnsupportedRequestError,
    backend_name_to_enum,
)


def request(**fields):
    return AttentionRequest(**{"head_size": 64, "dtype": "bfloat16", "device": "cuda:0", **fields})


EVERYTHING = Capabilities(
    dtypes={"bfloat16"},
    head_sizes={64},
    devices={"cuda"},
    cuda_archs={90},
    causal=True,
    gqa=True,
    cross_attention=True,
    masks={"bool"},
    softmax_scale=True,
    backward=True,
    returns_lse=True,
    exactness="exact",
    compile="fullgraph",
    sequence_parallel={"ulysses"},
)


def test_torch_objects_are_kept_as_strings():
    torch = pytest.importorskip("torch")
    kept = request(dtype=torch.float16, device=torch.device("cuda", 1))
    assert (kept.dtype, kept.device, kept.device_type) == ("float16", "cuda:1", "cuda")
    assert json.dumps(kept.to_dict())


@pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("float", "float32")])
def test_short_dtype_names_mean_the_same(short, name):
    assert request(dtype=short) == request(dtype=name)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("head_size", 0, "head_size must be an integer >= 1, got 0"),
        ("head_size", 64.0, "head_size must be an integer"),
        ("num_heads", True, "num_heads must be an integer"),
        ("sp_size", None, "sp_size must be an integer"),
        ("device", "cuda:x", "'cuda:x' is not a device"),
        ("mask", "triangular", "mask='triangular' is not a mask form"),
    ],
)
def test_request_out_of_range_is_refused_by_name(field, value, text):
    with pytest.raises(UnsupportedRequestError, match=text):
        request(**{field: value})


def test_query_heads_must_be_a_multiple_of_key_heads():
    with pytest.raises(UnsupportedRequestError, match="num_heads=6 is not a multiple of num_kv_heads=4"):
        request(num_heads=6, num_kv_heads=4)


@pytest.mark.parametrize("arch", [90, "90", "sm90", "sm_90", "sm_90a", "9.0"])
def test_compute_capability_has_one_meaning_in_every_spelling(arch):
    assert Capabilities(cuda_archs={arch}).cuda_archs == {90}


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("dtypes", {"bf16"}, r"dtypes: unknown \['bf16'\]"),
        ("dtypes", "float32", "dtypes is a set of strings"),
        ("masks", {"causal"}, "masks: unknown"),
        ("sequence_parallel", {"tensor"}, "sequence_parallel: unknown"),
        ("cuda_archs", {"hopper"}, "'hopper' is no compute capability"),
        ("exactness", "approximate", "exactness='approximate'"),
        ("compile", True, "compile=True"),
    ],
)
def test_capability_that_does_not_exist_is_refused_by_name(field, value, text):
    with pytest.raises(ValueError, match=text):
        Capabilities(**{field: value})


def test_capabilities_are_json():
    plain = json.loads(json.dumps(EVERYTHING.to_dict()))
    assert plain["dtypes"] == ["bfloat16"]
    assert Capabilities(head_sizes=range(8, 257, 8)).to_dict()["head_sizes"] == {"start": 8, "stop": 257, "step": 8}


def test_request_within_capabilities_misses_nothing():
    full = request(
        causal=True, num_heads=8, num_kv_heads=2, needs_backward=True, needs_lse=True, cross_attention=True, mask="bool",
        sp_size=2, compile=True, softmax_scale=0.5,
    )  # fmt: skip
    assert EVERYTHING.missing(full, 90) == []


@pytest.mark.parametrize(
    ("fields", "arch", "code"),
    [
        ({"dtype": "float32"}, 90, "dtype"),
        ({"head_size": 80}, 90, "head_size"),
        ({"device": "cpu"}, None, "device"),
        ({}, 120, "cuda_arch"),
        ({}, None, "cuda_arch"),
        ({"mask": "additive"}, 90, "mask"),
    ],
)
def test_each_value_outside_the_declared_is_a_reason(fields, arch, code):
    assert [reason.code for reason in EVERYTHING.missing(request(**fields), arch)] == [code]


def test_every_missing_capability_is_listed_not_only_the_first():
    asked = request(
        causal=True, num_heads=8, num_kv_heads=2, needs_backward=True, needs_lse=True, cross_attention=True, mask="bool",
        sp_size=2, compile=True, softmax_scale=0.0,
    )  # fmt: skip
    codes = [reason.code for reason in Capabilities().missing(asked, 90)]
    assert codes == [
        "dtype", "head_size", "device", "causal", "gqa", "cross_attention", "softmax_scale", "backward", "lse", "mask",
        "compile", "sequence_parallel",
    ]  # fmt: skip


def test_reason_names_asked_and_supported():
    (reason,) = EVERYTHING.missing(request(head_size=80), 90)
    assert str(reason) == "head_size=80 (supported: 64)"
    assert str(Reason("code", "text", "hint")) == "text (hint)"


def test_default_scale_needs_no_capability():
    assert not request(softmax_scale=64**-0.5).has_custom_scale
    assert request(softmax_scale=0.0).has_custom_scale


@pytest.mark.parametrize("name", ["my_attn", "MY-ATTN", "", "_ATTN", 3])
def test_malformed_backend_name_is_refused(name):
    with pytest.raises(ValueError, match="must be upper case words"):
        BackendSpec(name, target="a.b:C")


def test_malformed_spec_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="target='a.b'"):
        BackendSpec("A_ATTN", target="a.b")
    with pytest.raises(ValueError, match="probe='check'"):
        BackendSpec("A_ATTN", target="a:B", probe="check")
    with pytest.raises(TypeError, match="aliases is a tuple of strings, got 'VSA'"):
        BackendSpec("A_ATTN", target="a:B", aliases="VSA")
    with pytest.raises(TypeError, match="capabilities must be a Capabilities, got dict"):
        BackendSpec("A_ATTN", target="a:B", capabilities={})


def test_names_convert_in_any_case():
    assert backend_name_to_enum(" sla_attn ") is AttentionBackendEnum.SLA_ATTN
    assert backend_name_to_enum("MY_ATTN") is None
    with pytest.raises(UnsupportedRequestError, match="named by a string or an AttentionBackendEnum member, got None"):
        backend_name_to_enum(None)


def test_every_member_names_its_distribution():
    assert {member.distribution for member in AttentionBackendEnum} == {
        "attnmux", "attnmux-blocksparse", "attnmux-sla", "attnmux-vsa", "attnmux-vmoba", "attnmux-sage",
    }  # fmt: skip
