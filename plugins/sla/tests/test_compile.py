import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from attnmux_sla import SLAAttentionImpl, SLAAttentionMetadata

CONFIGURATIONS = {
    "default": {},
    "complement": {"linear_keys": "complement"},
    "marginal": {"linear_keys": "marginal"},
    "sla2": {"linear_keys": "complement", "router": "learned", "combine": "alpha"},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(length_q=300, length_k=400, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, 2, 16, generator=generator).to(dtype) for length in (length_q, length_k, length_k)]


def make_impl(name="default"):
    torch.manual_seed(0)
    impl = SLAAttentionImpl(2, 16, topk_ratio=0.4, **CONFIGURATIONS[name])
    for parameter in impl.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return impl


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_forward_and_backward_trace_as_one_graph(name, dynamic):
    impl = make_impl(name)
    counter = CompileCounter()
    compiled = torch.compile(impl, fullgraph=True, dynamic=dynamic, backend=counter)
    inputs = [x.requires_grad_() for x in tensors()]
    expected, actual = impl(*inputs), compiled(*inputs)
    assert counter.frame_count == 1
    assert torch.equal(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_forward_and_backward_run_through_aot_autograd(name):
    impl = make_impl(name).double()
    compiled = torch.compile(impl, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in tensors(dtype=torch.float64)]
    actual, expected = compiled(*inputs), impl(*inputs)
    torch.testing.assert_close(actual, expected)
    leaves = [*inputs, *(x for name, x in impl.named_parameters() if not name.startswith("router"))]
    for ours, theirs in zip(
        torch.autograd.grad(actual.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_timesteps_do_not_recompile():
    impl, counter = make_impl(), CompileCounter()
    compiled = torch.compile(impl, fullgraph=True, backend=counter)
    for step in range(5):
        compiled(*tensors(), SLAAttentionMetadata(step, 0.4))
    assert counter.frame_count <= 2


def test_a_ratio_schedule_and_other_lengths_recompile_once():
    impl, counter = make_impl(), CompileCounter()
    compiled = torch.compile(impl, fullgraph=True, backend=counter)
    for step, (ratio, length) in enumerate(
        ((0.9, 700), (0.7, 800), (0.5, 900), (0.4, 1100), (0.35, 1200), (0.3, 1300))
    ):
        inputs = tensors(length, 2 * length)
        metadata = SLAAttentionMetadata(step, ratio)
        torch.testing.assert_close(compiled(*inputs, metadata), impl(*inputs, metadata))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_forward_moves_nothing_to_the_host(name):
    # A fake tensor has no data: whatever asks for a value raises.
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 300, 2, 16, requires_grad=True) for _ in range(3))
        make_impl(name)(q, k, v).sum().backward()
        assert q.grad.shape == q.shape
