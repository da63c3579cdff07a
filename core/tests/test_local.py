"""LocalAttention: same bits as the bare impl, and nothing passes that the backend does not take."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnmux import (
    AttentionBackendEnum,
    AttentionImpl,
    AttentionMetadata,
    Capabilities,
    LocalAttention,
    UnsupportedRequestError,
    set_forward_context,
    use_backend,
)
from attnmux.rotary import apply_rotary

CAPABILITIES = Capabilities(
    dtypes={"float32"}, head_sizes={8}, devices={"cpu", "cuda"}, cuda_archs={"any"}, gqa=True, softmax_scale=True,
    exactness="exact", extra_inputs={"gate"},
)  # fmt: skip


def qkv(heads=4, kv_heads=4, length_q=5, length_k=5, size=8, dtype=torch.float32):
    return [
        torch.randn(2, length, n, size, dtype=dtype)
        for length, n in ((length_q, heads), (length_k, kv_heads), (length_k, kv_heads))
    ]


class Spy(AttentionImpl):
    """Records what reaches it."""

    def forward(self, query, key, value, attn_metadata, *, gate=None):
        self.seen = (query, key, value, attn_metadata, gate)
        return value if gate is None else value * gate


@pytest.fixture
def spy(install, make_backend):
    def make(impl=Spy, capabilities=CAPABILITIES, metadata=AttentionMetadata, layer_arguments=None):
        install(
            "SPY_ATTN",
            backend=make_backend("SPY_ATTN", get_impl_cls=lambda: impl, get_metadata_cls=lambda: metadata),
            capabilities=capabilities,
        )
        return LocalAttention(4, 8, backend="SPY_ATTN", **(layer_arguments or {}))

    return make


def test_same_bits_as_the_bare_impl():
    layer = LocalAttention(4, 8, backend="TORCH_SDPA")
    q, k, v = qkv()
    assert torch.equal(layer(q, k, v), layer.attn_impl.forward(q, k, v, None))


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_operator_more_than_the_bare_impl():
    layer = LocalAttention(4, 8, backend="TORCH_SDPA")
    q, k, v = qkv()
    with Launches() as bare:
        layer.attn_impl.forward(q, k, v, None)
    with Launches() as whole:
        layer(q, k, v)
    assert whole.names == bare.names


def test_tensors_reach_the_impl_uncopied(spy):
    layer = spy()
    q, k, v = qkv()
    layer(q, k, v)
    assert all(got is given for got, given in zip(layer.attn_impl.seen, (q, k, v), strict=False))


def test_attributes():
    layer = LocalAttention(4, 8, num_kv_heads=2, dtype=torch.bfloat16)
    assert layer.backend in {AttentionBackendEnum.TORCH_SDPA, AttentionBackendEnum.FLASH_ATTN}
    assert layer.backend_name == layer.backend.value
    assert layer.dtype == torch.bfloat16
    assert layer.selection.source == "automatic"
    assert f"backend={layer.backend_name}, num_heads=4, head_size=8" in repr(layer)


def test_out_of_tree_backend_has_a_name_and_no_member(spy):
    layer = spy()
    assert layer.backend is None
    assert layer.backend_name == "SPY_ATTN"


def test_default_dtype_is_torchs_at_construction():
    torch.set_default_dtype(torch.float64)
    try:
        assert LocalAttention(4, 8).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_selection_happens_at_construction_only():
    layer = LocalAttention(4, 8)
    with use_backend("NO_ATTENTION"):
        layer(*qkv())
        with pytest.raises(UnsupportedRequestError, match="built with NO_ATTENTION"):
            LocalAttention(4, 8).attn_impl.forward(*qkv(), None)


def test_layer_without_a_kernel_says_so_when_it_is_called():
    layer = LocalAttention(4, 8, backend=AttentionBackendEnum.NO_ATTENTION)
    assert layer.backend is AttentionBackendEnum.NO_ATTENTION
    with pytest.raises(UnsupportedRequestError, match="built with NO_ATTENTION and has no kernel"):
        layer(*qkv())


def test_constructor_arguments_reach_the_impl():
    layer = LocalAttention(4, 8, 2, 0.5, False, backend="TORCH_SDPA", prefix="blocks.3.attn")
    impl = layer.attn_impl
    assert (impl.num_heads, impl.head_size, impl.num_kv_heads, impl.softmax_scale, impl.prefix) == (
        4,
        8,
        2,
        0.5,
        "blocks.3.attn",
    )


def test_unknown_constructor_argument_is_refused_by_name():
    with pytest.raises(UnsupportedRequestError, match="SDPAImpl does not know the argument topk_ratio"):
        LocalAttention(4, 8, backend="TORCH_SDPA", topk_ratio=0.1)


def test_scale_that_the_backend_cannot_take_is_refused_at_construction(spy):
    capabilities = Capabilities(dtypes={"float32"}, head_sizes={8}, devices={"cpu", "cuda"}, cuda_archs={"any"})
    spy(capabilities=capabilities)
    with pytest.raises(UnsupportedRequestError, match="softmax_scale=0.0"):
        LocalAttention(4, 8, softmax_scale=0.0, backend="SPY_ATTN")


def test_rotary_turns_q_and_k_only(spy):
    layer = spy()
    q, k, v = qkv()
    angles = torch.randn(5, 4)
    freqs = (angles.cos(), angles.sin())
    layer(q, k, v, freqs)
    seen = layer.attn_impl.seen
    assert torch.equal(seen[0], apply_rotary(q, freqs))
    assert torch.equal(seen[1], apply_rotary(k, freqs))
    assert seen[2] is v


def test_extra_inputs_reach_the_impl_and_none_counts_as_not_given(spy):
    layer = spy()
    q, k, v = qkv()
    gate = torch.full_like(v, 2.0)
    assert torch.equal(layer(q, k, v, gate=gate), v * 2)
    layer(q, k, v, gate=None)
    assert layer.attn_impl.seen[4] is None


@pytest.mark.parametrize("name", ["gate_compress", "return_lse", "mask"])
def test_undeclared_extra_input_is_refused_by_name(spy, name):
    layer = spy()
    with pytest.raises(
        UnsupportedRequestError, match=rf"SPY_ATTN does not take {name} \(extra inputs it declares: gate\)"
    ):
        layer(*qkv(), **{name: None})


class Tiles(AttentionMetadata):
    pass


def test_metadata_argument_wins_over_the_context(spy):
    layer = spy(metadata=Tiles)
    mine, other = Tiles(1), Tiles(2)
    with set_forward_context(current_timestep=2, attn_metadata=other):
        layer(*qkv())
        assert layer.attn_impl.seen[3] is other
        layer(*qkv(), attn_metadata=mine)
        assert layer.attn_impl.seen[3] is mine


def test_context_of_another_backend_is_no_metadata_for_this_one(spy):
    layer = spy(metadata=Tiles)
    with set_forward_context(current_timestep=2, attn_metadata=AttentionMetadata(2)):
        layer(*qkv())
    assert layer.attn_impl.seen[3] is None


def test_metadata_argument_of_another_class_is_refused(spy):
    layer = spy(metadata=Tiles)
    with pytest.raises(
        UnsupportedRequestError, match="attn_metadata must be a Tiles for SPY_ATTN, got AttentionMetadata"
    ):
        layer(*qkv(), attn_metadata=AttentionMetadata(1))


class Flipping(Spy):
    """Flips the sequence before, and back after."""

    def preprocess_qkv(self, qkv, attn_metadata):
        return qkv.flip(1)

    def postprocess_output(self, output, attn_metadata):
        return output.flip(1)


def test_preprocess_and_postprocess_run_around_the_impl(spy):
    layer = spy(impl=Flipping)
    q, k, v = qkv()
    assert torch.equal(layer(q, k, v), v)
    assert torch.equal(layer.attn_impl.seen[0], q.flip(1))


class WithParameter(torch.nn.Module, Spy):
    def __init__(self, *args, **kwargs):
        torch.nn.Module.__init__(self)
        Spy.__init__(self, *args, **kwargs)
        self.proj_l = torch.nn.Linear(8, 8)

    forward = Spy.forward


def test_parameters_of_an_impl_are_in_the_state_dict(spy):
    layer = spy(impl=WithParameter)
    assert set(layer.state_dict()) == {"attn_impl.proj_l.weight", "attn_impl.proj_l.bias"}


BAD = {
    "three dimensions": (lambda q, k, v: (q[0], k, v), r"q must be \[B, S, 4, 8\] .*, got \[5, 4, 8\]"),
    "heads of q": (lambda q, k, v: (q[:, :, :3], k, v), r"q must be \[B, S, 4, 8\]"),
    "head size of k": (lambda q, k, v: (q, k[..., :4], v), r"k must be \[B, S, 4, 8\]"),
    "heads of v": (lambda q, k, v: (q, k, v[:, :, :2]), r"v must be \[B, S, 4, 8\]"),
    "lengths of k and v": (lambda q, k, v: (q, k, v[:, :3]), "k and v must agree"),
    "batch": (lambda q, k, v: (q, k[:1], v[:1]), "have the batch size of q 2: got k"),
    "dtype": (
        lambda q, k, v: (q.double(), k.double(), v.double()),
        r"SPY_ATTN declares \(float32\), got torch.float64",
    ),
    "mixed dtypes": (lambda q, k, v: (q, k.double(), v), "must have one dtype"),
    "device": (lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")), "must be on one device.*got meta"),
    "mixed devices": (lambda q, k, v: (q, k, v.to("meta")), "must be on one device"),
    "gradients": (lambda q, k, v: (q.requires_grad_(), k, v), "SPY_ATTN computes no gradients"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_do_not_fit_are_refused_by_name(spy, case):
    change, text = BAD[case]
    layer = spy()
    with pytest.raises(UnsupportedRequestError, match=text):
        layer(*change(*qkv()))


def test_no_gradients_are_no_problem_without_grad_mode(spy):
    layer = spy()
    q, k, v = qkv()
    with torch.no_grad():
        layer(q.requires_grad_(), k, v)


def test_grouped_queries_and_other_key_lengths():
    layer = LocalAttention(4, 8, num_kv_heads=2, backend="TORCH_SDPA")
    assert layer(*qkv(kv_heads=2, length_k=9)).shape == (2, 5, 4, 8)


def test_compiles_with_dynamic_length_once():
    torch._dynamo.reset()
    layer = LocalAttention(4, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    compiled(*qkv(length_q=5, length_k=7))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 33, 64):
            q, k, v = qkv(length_q=length, length_k=length + 2)
            assert torch.equal(compiled(q, k, v), layer(q, k, v))
