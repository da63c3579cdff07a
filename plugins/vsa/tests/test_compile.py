import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import attnmux_vsa.reference as reference
from attnmux_vsa import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder

GRID = (5, 7, 3)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def metadata(step=0, sparsity=0.5, grid=GRID):
    return VideoSparseAttentionMetadataBuilder().build(step, grid, (1, 1, 1), sparsity, "cpu")


def tensors(count=4, grid=GRID, heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    S = grid[0] * grid[1] * grid[2]
    return [torch.randn(1, S, heads, 8, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_forward_and_backward_trace_as_one_graph(dynamic, gated):
    impl = VideoSparseAttentionImpl(2, 8)
    counter = CompileCounter()
    compiled = torch.compile(impl.forward, fullgraph=True, dynamic=dynamic, backend=counter)
    inputs = [x.requires_grad_() for x in tensors(4 if gated else 3)]
    gate = {"gate_compress": inputs[3]} if gated else {}
    expected = impl.forward(*inputs[:3], metadata(), **gate)
    actual = compiled(*inputs[:3], metadata(), **gate)
    assert counter.frame_count == 1
    assert torch.equal(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_and_backward_run_through_aot_autograd(grad):
    impl = VideoSparseAttentionImpl(2, 8)
    compiled = torch.compile(impl.forward, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_(grad) for x in tensors(dtype=torch.float64)]
    actual, expected = (call(*inputs[:3], metadata(), gate_compress=inputs[3]) for call in (compiled, impl.forward))
    torch.testing.assert_close(actual, expected)
    if grad:
        for ours, theirs in zip(
            torch.autograd.grad(actual.sin().sum(), inputs),
            torch.autograd.grad(expected.sin().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("grad", [False, True])
def test_chunks_trace_as_one_graph(monkeypatch, grad):
    monkeypatch.setattr(reference, "_CHUNK_NUMBERS", 3 * 4 * 64 * 64)
    impl = VideoSparseAttentionImpl(2, 8)
    compiled = torch.compile(impl.forward, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_(grad) for x in tensors(3, dtype=torch.float64)]
    actual, expected = compiled(*inputs, metadata()), impl.forward(*inputs, metadata())
    torch.testing.assert_close(actual, expected)
    if grad:
        for ours, theirs in zip(
            torch.autograd.grad(actual.sin().sum(), inputs),
            torch.autograd.grad(expected.sin().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_timesteps_do_not_recompile():
    impl = VideoSparseAttentionImpl(2, 8)
    counter = CompileCounter()
    compiled = torch.compile(impl.forward, fullgraph=True, backend=counter)
    for step in range(6):
        compiled(*tensors(3), metadata(step))
    assert counter.frame_count == 1


def test_a_sparsity_schedule_recompiles_at_most_once():
    impl = VideoSparseAttentionImpl(2, 8)
    counter = CompileCounter()
    compiled = torch.compile(impl.forward, fullgraph=True, backend=counter)
    grid = (8, 8, 16)
    inputs = tensors(3, grid)
    for topk in (12, 11, 9, 7, 6, 4, 3, 2):
        described = VideoSparseAttentionMetadataBuilder().build(0, grid, (1, 1, 1), None, "cpu", topk=topk)
        assert torch.equal(compiled(*inputs, described), impl.forward(*inputs, described))
    assert counter.frame_count <= 2


def test_another_grid_recompiles_once_and_further_ones_do_not():
    impl = VideoSparseAttentionImpl(2, 8)
    counter = CompileCounter()
    compiled = torch.compile(impl.forward, fullgraph=True, backend=counter)
    for grid in ((5, 6, 7), (7, 6, 10), (7, 9, 10), (8, 7, 15), (10, 7, 15), (10, 9, 14), (3, 17, 20)):
        inputs, described = tensors(4, grid), metadata(grid=grid, sparsity=0.67)
        actual = compiled(*inputs[:3], described, gate_compress=inputs[3])
        torch.testing.assert_close(actual, impl.forward(*inputs[:3], described, gate_compress=inputs[3]))
    assert counter.frame_count == 2


def test_forward_moves_nothing_to_the_host():
    # A fake tensor has no data: whatever asks for a value raises.
    with FakeTensorMode():
        q, k, v, gate = (torch.empty(1, 105, 2, 8, requires_grad=True) for _ in range(4))
        out = VideoSparseAttentionImpl(2, 8).forward(q, k, v, metadata(), gate_compress=gate)
        out.sum().backward()
        assert out.shape == gate.grad.shape == q.shape
