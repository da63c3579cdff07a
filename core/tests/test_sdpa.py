"""TORCH_SDPA beyond the conformance suite: masks, empty rows, log-sum-exp, the choice of kernel."""

import pytest
import torch

from attnmux import AttentionRequest, UnsupportedRequestError
from attnmux.backends import sdpa
from attnmux.backends.sdpa import SDPABackend, SDPAImpl


def qkv(batch=2, length_q=5, length_k=7, heads=4, kv_heads=4, size=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(batch, length, n, size, dtype=dtype, device=device, generator=generator)
        for length, n in ((length_q, heads), (length_k, kv_heads), (length_k, kv_heads))
    ]


def brute(q, k, v, visible, bias=0.0, scale=None):
    """Attention written out, row by row, with its LSE."""
    batch, length_q, heads, size = q.shape
    scale = size**-0.5 if scale is None else scale
    out, lse = torch.zeros_like(q), q.new_full((batch, heads, length_q), float("-inf"))
    visible = visible.expand(batch, heads, length_q, k.shape[1])
    bias = torch.as_tensor(bias, dtype=q.dtype).expand(visible.shape)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, length_q))).tolist():
        keys = visible[b, h, i].nonzero().flatten()
        if len(keys):
            kv_head = h * k.shape[2] // heads
            scores = k[b, keys, kv_head] @ q[b, i, h] * scale + bias[b, h, i, keys]
            lse[b, h, i] = scores.logsumexp(0)
            out[b, i, h] = scores.softmax(0) @ v[b, keys, kv_head]
    return out, lse


def masks():
    generator = torch.Generator().manual_seed(1)
    padding = torch.arange(7)[None, None, None, :] < torch.tensor([4, 6])[:, None, None, None]
    full = torch.rand(2, 4, 5, 7, generator=generator) > 0.4
    full[0, 1, 2] = False
    return {"none": torch.ones(1, 1, 1, 7, dtype=torch.bool), "key padding": padding, "full": full, "2-D": full[0, 0]}


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masks_causal_and_grouped_queries_combine(name, causal, kv_heads):
    q, k, v = qkv(kv_heads=kv_heads)
    mask = masks()[name]
    visible = mask & torch.ones(5, 7, dtype=torch.bool).tril(2) if causal else mask
    expected, expected_lse = brute(q, k, v, visible)
    impl = SDPAImpl(4, 8, causal=causal, num_kv_heads=kv_heads)
    given = None if name == "none" else mask
    assert torch.allclose(impl.forward(q, k, v, attn_mask=given), expected, atol=1e-12)
    out, lse = impl.forward(q, k, v, attn_mask=given, return_lse=True)
    assert torch.allclose(out, expected, atol=1e-12)
    assert lse.dtype == torch.float32
    assert torch.allclose(lse.double(), expected_lse, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_additive_mask_is_added_to_the_scaled_scores(causal):
    q, k, v = qkv()
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    visible = torch.ones(5, 7, dtype=torch.bool).tril(2) if causal else torch.ones(5, 7, dtype=torch.bool)
    expected, expected_lse = brute(q, k, v, visible, bias, scale=0.3)
    out, lse = SDPAImpl(4, 8, 0.3, causal).forward(q, k, v, attn_mask=bias.float(), return_lse=True)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse.double(), expected_lse, atol=1e-5)


def test_causal_rows_before_the_first_key_are_empty():
    q, k, v = qkv(length_q=7, length_k=3)
    q.requires_grad_()
    out, lse = SDPAImpl(4, 8, causal=True).forward(q, k, v, return_lse=True)
    assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
    assert torch.isneginf(lse[:, :, :4]).all()
    assert torch.isfinite(lse[:, :, 4:]).all()
    SDPAImpl(4, 8, causal=True).forward(q, k, v).sum().backward()
    assert torch.equal(q.grad[:, :4], torch.zeros_like(q.grad[:, :4]))
    assert torch.isfinite(q.grad).all()


def test_scale_of_zero_is_the_mean_of_the_values():
    q, k, v = qkv()
    out = SDPAImpl(4, 8, softmax_scale=0.0).forward(q, k, v)
    assert torch.allclose(out, v.mean(1, keepdim=True).expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_scale_prefers_the_least_similar_keys(dtype):
    q, k, v = qkv(dtype=dtype)
    expected, expected_lse = brute(*(x.double() for x in (q, k, v)), torch.ones(7, dtype=torch.bool), scale=-3.0)
    out, lse = SDPAImpl(4, 8, softmax_scale=-3.0).forward(q, k, v, return_lse=True)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.allclose(lse.double(), expected_lse, atol=1e-5)


def test_gradient_reaches_an_additive_mask():
    q, k, v = qkv()
    bias = torch.zeros(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    SDPAImpl(4, 8).forward(q, k, v, attn_mask=bias).square().sum().backward()
    assert bias.grad.abs().sum() > 0
    with pytest.raises(UnsupportedRequestError, match="attn_mask requires gradients"):
        SDPAImpl(4, 8).forward(q, k, v, attn_mask=bias, return_lse=True)


def test_same_input_same_bits():
    q, k, v = qkv(length_q=65, length_k=65, dtype=torch.float32)
    outs, grads = [], []
    for _ in range(3):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = SDPAImpl(4, 8).forward(*leaves)
        out.sum().backward()
        outs.append(out.detach())
        grads.append(torch.cat([x.grad.flatten() for x in leaves]))
    assert all(torch.equal(outs[0], out) for out in outs)
    assert all(torch.equal(grads[0], grad) for grad in grads)


BAD = {
    "integer": (torch.ones(5, 7, dtype=torch.int64), "must be bool .* or additive floating point, got torch.int64"),
    "rank": (torch.ones(4, 5, 7, dtype=torch.bool), r"must broadcast to .* \[2, 4, 5, 7\], got \[4, 5, 7\]"),
    "keys": (torch.ones(2, 1, 1, 6, dtype=torch.bool), r"key padding is \[2, 1, 1, 7\]"),
    "batch": (torch.ones(3, 1, 1, 7, dtype=torch.bool), "must broadcast"),
    "device": (torch.ones(5, 7, dtype=torch.bool, device="meta"), "attn_mask is on meta, q on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_mask_that_does_not_fit_is_refused(case):
    mask, text = BAD[case]
    with pytest.raises(UnsupportedRequestError, match=text):
        SDPAImpl(4, 8).forward(*qkv(), attn_mask=mask)


@pytest.mark.parametrize(
    ("head_size", "dtype", "arch", "prefers"),
    [
        (128, "bfloat16", 90, True),
        (64, "float16", 90, True),
        (256, "bfloat16", 90, True),
        (264, "bfloat16", 90, False),
        (72, "bfloat16", 90, True),
        (60, "bfloat16", 90, False),
        (128, "float32", 90, False),
        (128, "bfloat16", 80, False),
    ],
)
def test_cudnn_is_preferred_where_it_was_measured_to_be_fastest(head_size, dtype, arch, prefers):
    assert sdpa._prefers_cudnn(head_size, dtype, arch) is prefers


def test_cudnn_is_not_used_where_the_user_rules_it_out(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not sdpa._prefers_cudnn(128, "bfloat16", 90)
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert not sdpa._prefers_cudnn(128, "bfloat16", 90)


def test_engine_is_described():
    asked = AttentionRequest(head_size=128, dtype="bfloat16", device="cpu")
    assert SDPABackend.describe_engine(asked) == f"torch {torch.__version__}, its kernel for cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_request_on_the_gpu(dtype, name, causal, kv_heads):
    q, k, v = qkv(kv_heads=kv_heads, size=64)
    mask = masks()[name]
    visible = mask & torch.ones(5, 7, dtype=torch.bool).tril(2) if causal else mask
    q, k, v = (x.to(dtype).double() for x in (q, k, v))
    expected, expected_lse = brute(q, k, v, visible)
    bound = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-10}[dtype]
    impl = SDPAImpl(4, 64, causal=causal, num_kv_heads=kv_heads)
    given = None if name == "none" else mask.cuda()
    leaves = [x.to("cuda", dtype).requires_grad_() for x in (q, k, v)]
    out = impl.forward(*leaves, attn_mask=given)
    out.sum().backward()
    assert (out.detach().cpu().double() - expected).abs().max() < bound
    assert all(torch.isfinite(x.grad).all() for x in leaves)
    assert torch.equal(out.detach().cpu()[expected == 0], torch.zeros_like(expected[expected == 0], dtype=dtype))
    out, lse = impl.forward(*(x.detach() for x in leaves), attn_mask=given, return_lse=True)
    assert (out.cpu().double() - expected).abs().max() < bound
    assert torch.allclose(lse.cpu().double(), expected_lse, atol=max(bound, 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_fused_kernels_cannot_take_are_right_on_the_gpu(scale):
    q, k, v = (x.to(torch.bfloat16).double() for x in qkv(length_q=65, length_k=65, size=64))
    expected, _ = brute(q, k, v, torch.ones(65, dtype=torch.bool), scale=scale)
    leaves = [x.to("cuda", torch.bfloat16).requires_grad_() for x in (q, k, v)]
    out = SDPAImpl(4, 64, softmax_scale=scale).forward(*leaves)
    out.sum().backward()
    assert (out.detach().cpu().double() - expected).abs().max() < 3e-2
    assert all(torch.isfinite(x.grad).all() for x in leaves)


@pytest.mark.gpu
def test_the_fast_kernel_runs_and_traces_without_a_graph_break():
    impl = SDPAImpl(4, 128)
    q, k, v = (torch.randn(1, 256, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        impl.forward(q, k, v).sum().backward()
    names = {event.key for event in profile.key_averages()}
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert ("aten::_scaled_dot_product_cudnn_attention" in names) is on_hopper
    compiled = torch.compile(lambda q, k, v: impl.forward(q, k, v), fullgraph=True, dynamic=True)
    assert torch.allclose(compiled(q, k, v), impl.forward(q, k, v), atol=1e-2)
