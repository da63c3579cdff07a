"""FLASH_ATTN: which version runs, what reaches it, and what is refused. The libraries are replaced by stand-ins."""

import importlib.machinery
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from attnmux import (
    AttentionRequest,
    BackendUnavailableError,
    LocalAttention,
    UnsupportedRequestError,
    select_backend,
)
from attnmux.backends import flash_attn, plugin
from attnmux.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from attnmux.distributed.merge import merge_part
from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle

SPEC = plugin.FLASH_ATTN


def attention(q, k, v, scale, causal):
    """Bottom-right causal attention on [B, S, H, D] and its LSE; +inf where a row is empty, as flash-attn has it."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    if causal:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(0.0), v.double()).to(q.dtype)
    return out, lse.masked_fill(torch.isneginf(lse), float("inf")).float()


def attention_gradients(q, k, v, grad, scale, causal, out, lse):
    """As a flash backward computes them, from output and LSE: inside a custom operator autograd does not run."""
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(groups, dim=2).double() for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), wide_k) * scale
    if causal:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.exp(scores - lse.double()[..., None])
    grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad.double(), wide_v)
    delta = (grad.double() * out.double()).sum(-1).transpose(1, 2)
    grad_scores = weights * (grad_weights - delta[..., None]) * scale
    grad_q = torch.einsum("bhqk,bkhd->bqhd", grad_scores, wide_k)
    grad_k = torch.einsum("bhqk,bqhd->bkhd", grad_scores, q.double()).unflatten(2, (-1, groups)).sum(3)
    grad_v = torch.einsum("bhqk,bqhd->bkhd", weights, grad.double()).unflatten(2, (-1, groups)).sum(3)
    return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype)


def packed_attention(q, k, v, bounds_q, bounds_k, scale, causal):
    parts = [
        attention(*(x[None, a:b] for x, (a, b) in ((q, sq), (k, sk), (v, sk))), scale, causal)
        for sq, sk in zip(
            zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True),
            zip(bounds_k[:-1].tolist(), bounds_k[1:].tolist(), strict=True),
            strict=True,
        )
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)


class Calls(list):
    pass


@pytest.fixture
def libraries(monkeypatch):
    """Return a function that puts stand-ins for the given versions in place, on a card of the given capability."""
    calls = Calls()

    def module(name, **content):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        made.__path__ = []
        for key, value in content.items():
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def func(q, k, v, *, softmax_scale, causal, deterministic, return_attn_probs):
        calls.append(("dense", softmax_scale, causal, deterministic))
        return (*attention(q, k, v, softmax_scale, causal), None)

    def varlen(
        q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, softmax_scale, causal, deterministic, return_attn_probs
    ):
        calls.append(("packed", softmax_scale, causal, deterministic, longest_q, longest_k))
        return (*packed_attention(q, k, v, bounds_q, bounds_k, softmax_scale, causal), None)

    def forward_4(
        q, k, v, *, softmax_scale, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_lse
    ):
        calls.append(("forward 4", softmax_scale, causal, max_seqlen_q))
        if cu_seqlens_q is None:
            out, lse = attention(q, k, v, softmax_scale, causal)
        else:
            out, lse = packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return out, lse, None, None, None

    def backward_4(
        q, k, v, out, dout, lse, scale, causal, *, deterministic, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    ):
        calls.append(("backward 4", scale, causal, deterministic))
        if cu_seqlens_q is not None:
            raise NotImplementedError("the stand-in has no packed backward")
        return attention_gradients(q, k, v, dout, scale, causal, out, lse)

    def place(*versions, arch=90):
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn_interface"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        if {2, 4} & set(versions):
            module("flash_attn")
        if 4 in versions:
            interface = module("flash_attn.cute.interface", _flash_attn_fwd=forward_4, _flash_attn_bwd=backward_4)
            module("flash_attn.cute", interface=interface)
        if 3 in versions:
            module("flash_attn_interface", flash_attn_func=func, flash_attn_varlen_func=varlen)
        if 2 in versions:
            module("flash_attn.flash_attn_interface", flash_attn_func=func, flash_attn_varlen_func=varlen)
        monkeypatch.setattr(flash_attn, "_device_arch", lambda device="cuda": arch)
        return calls

    return place


def qkv(length_q=6, length_k=6, heads=4, kv_heads=4, size=16, batch=2):
    return [
        torch.randn(batch, length, n, size, dtype=torch.float16)
        for length, n in ((length_q, heads), (length_k, kv_heads), (length_k, kv_heads))
    ]


@pytest.mark.parametrize(
    ("installed", "arch", "chosen"),
    [((2, 3, 4), 90, 4), ((2, 3), 90, 3), ((2,), 90, 2), ((2, 3, 4), 80, 2), ((2, 4), 100, 4), ((3,), 80, None), ((), 90, None),
     ((2, 3, 4), None, None), ((4,), 120, None)],
)  # fmt: skip
def test_newest_version_that_fits_the_device_is_chosen(libraries, installed, arch, chosen):
    libraries(*installed, arch=arch)
    version, _ = flash_attn._choose(arch, 128)
    assert (version.number if version else None) == chosen


def test_head_size_that_version_4_lacks_on_blackwell_goes_to_version_2(libraries):
    libraries(2, 4, arch=100)
    version, passed = flash_attn._choose(100, 192)
    assert version.number == 2
    assert passed[0] == "flash-attn 4 on sm_100 takes head sizes up to 128, and 256, not 192"


def test_explanation_says_which_version_and_why_no_newer(libraries):
    libraries(2, 4, arch=80)
    asked = AttentionRequest(head_size=64, dtype="float16", device="cuda:0")
    assert FlashAttentionBackend.describe_engine(asked) == (
        "flash-attn 2 (flash_attn.flash_attn_interface); flash-attn 4 runs on sm_90, sm_100, sm_103, not on sm_80; "
        "flash-attn 3 is not installed (built from flash-attention's hopper folder)"
    )
    assert FlashAttentionBackend.check_request(asked) == []


def test_no_version_that_fits_lists_why_for_each(libraries):
    libraries(4, arch=80)
    asked = AttentionRequest(head_size=64, dtype="float16", device="cuda:0")
    assert [reason.text.split(" ")[1] for reason in FlashAttentionBackend.check_request(asked)] == ["4", "3", "2"]
    assert FlashAttentionBackend.describe_engine(asked) == ""
    with pytest.raises(BackendUnavailableError, match="FLASH_ATTN cannot run here: flash-attn 4 runs on"):
        FlashAttentionImpl(4, 16)


def test_absent_library_is_never_replaced(monkeypatch):
    monkeypatch.setattr(plugin, "find_spec", lambda module: None)
    assert "pip install 'attnmux[flash]'" in plugin.probe_flash_attn()
    if plugin.find_spec("flash_attn") is None:
        request = AttentionRequest(head_size=64, dtype="float16", device="cuda:0")
        with pytest.raises(BackendUnavailableError, match="no flash-attn is installed"):
            select_backend(request, backend="FLASH_ATTN")


def test_probe_finds_any_version(libraries):
    for version in (2, 3, 4):
        libraries(version)
        assert plugin.probe_flash_attn() is None


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length_k", "kv_heads"), [(6, 4), (9, 2), (3, 4)])
def test_output_and_lse(libraries, version, causal, length_k, kv_heads):
    libraries(version)
    q, k, v = qkv(length_k=length_k, kv_heads=kv_heads)
    impl = FlashAttentionImpl(4, 16, 0.3, causal, kv_heads)
    out, lse = impl.forward(q, k, v, return_lse=True)
    expected, expected_lse = attention(q, k, v, 0.3, causal)
    assert torch.equal(out, expected)
    empty = torch.isposinf(expected_lse)
    assert torch.isneginf(lse[empty]).all()
    assert empty.any() == (causal and length_k < 6)
    assert torch.equal(lse[~empty], expected_lse[~empty])
    assert torch.equal(impl.forward(q, k, v), expected)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_scale_causal_and_determinism_reach_the_library(libraries, version, monkeypatch):
    calls = libraries(version)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    q, k, v = (x.requires_grad_() for x in qkv())
    FlashAttentionImpl(4, 16, 0.3, True).forward(q, k, v).sum().backward()
    assert calls[0][1:3] == (0.3, True)
    assert calls[-1][3] is True


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_the_library_cannot_take_reach_it_through_the_queries(libraries, version, scale):
    calls = libraries(version)
    q, k, v = qkv()
    out = FlashAttentionImpl(4, 16, scale).forward(q, k, v)
    assert calls[0][1] > 0
    assert torch.allclose(out.float(), attention(q, k, v, scale, False)[0].float(), atol=1e-3)


def test_other_dtypes_are_refused(libraries):
    libraries(2)
    with pytest.raises(UnsupportedRequestError, match="float16 and bfloat16, got dtype torch.float32"):
        FlashAttentionImpl(4, 16).forward(*(x.float() for x in qkv()))


@pytest.mark.parametrize("version", [2, 3, 4])
def test_packed_sequences(libraries, version):
    calls = libraries(version)
    q, k, v = qkv(length_q=7, length_k=9, batch=1)
    bounds_q, bounds_k = (torch.tensor(b, dtype=torch.int32) for b in ([0, 3, 7], [0, 4, 9]))
    metadata = FlashAttentionMetadataBuilder().build(
        current_timestep=0, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, max_seqlen_q=4, max_seqlen_k=5
    )
    out, lse = FlashAttentionImpl(4, 16).forward(q, k, v, metadata, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (1, 4, 7)
    expected = attention(q[:, 3:], k[:, 4:], v[:, 4:], 0.25, False)[0]
    assert torch.equal(out[:, 3:], expected)
    assert calls


def test_gradients_of_version_4(libraries):
    libraries(4)
    q, k, v = (x.requires_grad_() for x in qkv(length_k=9, kv_heads=2))
    out = FlashAttentionImpl(4, 16, causal=True, num_kv_heads=2).forward(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    expected = torch.autograd.grad(attention(q, k, v, 0.25, True)[0], (q, k, v), torch.ones_like(out))
    for got, want in zip(grads, expected, strict=True):
        assert torch.allclose(got.float(), want.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize(("scale", "kv_heads"), [(0.3, 4), (-0.7, 2), (0.0, 4)])
def test_gradients_of_parts_add_up_to_those_of_the_whole(libraries, version, scale, kv_heads):
    libraries(version)
    q, k, v = qkv(length_k=9, kv_heads=kv_heads)
    impl = FlashAttentionImpl(4, 16, scale, num_kv_heads=kv_heads)
    parts = list(zip(k.split([1, 5, 3], 1), v.split([1, 5, 3], 1), strict=True))
    merged = None
    for key, value in parts:
        merged = merge_part(merged, *impl.attend_part(q, key, value, None))
    out, lse = merged[0].half(), merged[1]
    grad = torch.randn_like(out)
    found = [impl.part_gradients(grad, q, key, value, out, lse, None) for key, value in parts]

    def whole(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        run = dense_attention_oracle if dtype == torch.float64 else dense_attention_baseline
        output = run(*leaves, softmax_scale=scale)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    exact, plain = whole(torch.float64), whole(torch.float16)
    assert_close_to_oracle(out, exact[0], plain[0])
    sums = [sum(part[0].float() for part in found), *(torch.cat([part[i] for part in found], 1) for i in (1, 2))]
    for name, total, want, baseline in zip("qkv", sums, exact[1:], plain[1:], strict=True):
        assert_close_to_oracle(total.half(), want, baseline, kind="gradient", what=f"gradient of {name}")


def test_operators_of_version_4_pass_opcheck(libraries):
    libraries(4)
    q, k, v = (x.requires_grad_() for x in qkv())
    none = (None, None, None, None)
    arguments = (q, k, v, 0.25, False, False, *none)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.attnmux.flash_attn_4.default, arguments, test_utils=tests)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.attnmux.flash_attn_4.default,
        (q[0], k[0], v[0], 0.25, True, False, bounds, bounds, 4, 4),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_version_4_traces_without_graph_break(libraries):
    torch._dynamo.reset()
    libraries(4)
    impl = FlashAttentionImpl(4, 16)
    compiled = torch.compile(lambda q, k, v: impl.forward(q, k, v), fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v = qkv()
    assert torch.equal(compiled(q, k, v), impl.forward(q, k, v))


BAD_METADATA = {
    "only keys": ({"cu_seqlens_k": torch.zeros(2, dtype=torch.int32)}, "need cu_seqlens_q"),
    "no longest": ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, "needs max_seqlen_q"),
    "no longest key": (
        {"cu_seqlens_q": torch.zeros(2, dtype=torch.int32), "max_seqlen_q": 1, "cu_seqlens_k": torch.zeros(2, dtype=torch.int32)},
        "needs max_seqlen_k",
    ),
    "dtype": ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int64), "max_seqlen_q": 1}, "must be int32"),
    "counts": (
        {"cu_seqlens_q": torch.zeros(2, dtype=torch.int32), "max_seqlen_q": 1,
         "cu_seqlens_k": torch.zeros(3, dtype=torch.int32), "max_seqlen_k": 1},
        "counts 1 sequences, cu_seqlens_k 2",
    ),
    "unknown": ({"window": 3}, "have no field window"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_METADATA)
def test_metadata_that_do_not_fit_are_refused(case):
    fields, text = BAD_METADATA[case]
    builder = FlashAttentionMetadataBuilder()
    builder.prepare()
    with pytest.raises(UnsupportedRequestError, match=text):
        builder.build(current_timestep=0, **fields)


def test_packed_batches_and_devices_are_refused(libraries):
    libraries(2)
    impl = FlashAttentionImpl(4, 16)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(UnsupportedRequestError, match="one batch entry .* q has batch size 2"):
        impl.forward(*qkv(), FlashAttentionMetadata(0, bounds, max_seqlen_q=6))
    with pytest.raises(UnsupportedRequestError, match="cu_seqlens_q is on meta"):
        impl.forward(*qkv(batch=1), FlashAttentionMetadata(0, bounds.to("meta"), max_seqlen_q=6))


@pytest.mark.parametrize("size", [12, 264])
def test_head_sizes_outside_are_refused(libraries, size):
    libraries(2)
    with pytest.raises(UnsupportedRequestError, match=f"head sizes 8 to 256 in steps of 8, got {size}"):
        FlashAttentionImpl(4, size)


def test_half_precision_on_cuda_only():
    asked = AttentionRequest(head_size=64, dtype="float32", device="cpu")
    assert [reason.code for reason in SPEC.capabilities.missing(asked)] == ["dtype", "device"]


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length_k", "kv_heads"), [(300, 4), (129, 2)])
def test_installed_library_agrees_with_torch_on_the_gpu(causal, length_k, kv_heads):
    if plugin.probe_flash_attn() is not None:
        pytest.skip("no flash-attn is installed")
    q, k, v = (x.cuda().requires_grad_() for x in qkv(300, length_k, 4, kv_heads, 128))
    layer = LocalAttention(4, 128, kv_heads, causal=causal, backend="FLASH_ATTN", dtype=torch.float16)
    reference = LocalAttention(4, 128, kv_heads, causal=causal, backend="TORCH_SDPA", dtype=torch.float16)
    out, expected = layer(q, k, v), reference(q, k, v)
    assert torch.allclose(out, expected, atol=4e-3)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    wanted = torch.autograd.grad(expected, (q, k, v), torch.ones_like(out))
    for got, want in zip(grads, wanted, strict=True):
        assert F.cosine_similarity(got.float().flatten(), want.float().flatten(), dim=0) > 0.999
    _, lse = layer.attn_impl.forward(q, k, v, return_lse=True)
    _, expected_lse = reference.attn_impl.forward(q, k, v, return_lse=True)
    assert torch.allclose(lse, expected_lse, atol=1e-2)
