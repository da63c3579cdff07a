"""The forward context: per thread, through recomputation, under compilation."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnmux import (
    AttentionMetadata,
    ForwardContextError,
    LocalAttention,
    get_forward_context,
    set_forward_context,
)
from attnmux.context import active_attn_metadata


def test_outside_there_is_none_and_the_error_says_what_to_do():
    assert active_attn_metadata() is None
    with pytest.raises(ForwardContextError, match=r"no forward context.*with attnmux\.set_forward_context"):
        get_forward_context()


def test_context_nests_and_comes_back_after_an_exception():
    outer, inner = AttentionMetadata(1), AttentionMetadata(2)
    with set_forward_context(current_timestep=1, attn_metadata=outer):
        with pytest.raises(KeyError), set_forward_context(current_timestep=2, attn_metadata=inner):
            assert get_forward_context().attn_metadata is inner
            assert get_forward_context().current_timestep == 2
            raise KeyError
        assert active_attn_metadata() is outer
    assert active_attn_metadata() is None


def in_thread(function):
    result = []

    def call():
        try:
            result.append(function())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            result.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(timeout=60)
    return result[0]


def test_context_belongs_to_its_thread():
    with set_forward_context(current_timestep=1):
        assert isinstance(in_thread(get_forward_context), ForwardContextError)


class Recorder(torch.nn.Module):
    """Records the timestep that each run of its forward sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(get_forward_context().current_timestep)
        return x.sin()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_sees_the_context_in_the_same_thread(use_reentrant):
    layer, x = Recorder(), torch.ones(2, requires_grad=True)
    with set_forward_context(current_timestep=7):
        checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert layer.seen == [7, 7]


def test_recomputation_in_another_thread_sees_the_active_context():
    layer, x = Recorder(), torch.ones(2, requires_grad=True)
    with set_forward_context(current_timestep=7):
        loss = checkpoint(layer, x, use_reentrant=False).sum()
        assert in_thread(loss.backward) is None
    assert layer.seen == [7, 7]
    assert torch.equal(x.grad, x.detach().cos())


def test_recomputation_in_another_thread_never_guesses_between_contexts():
    layer, x = Recorder(), torch.ones(2, requires_grad=True)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with set_forward_context(current_timestep=8):
            entered.set()
            leave.wait(timeout=60)

    other = threading.Thread(target=hold)
    other.start()
    entered.wait(timeout=60)
    with set_forward_context(current_timestep=7):
        loss = checkpoint(layer, x, use_reentrant=False).sum()
        error = in_thread(loss.backward)
    leave.set()
    other.join()
    assert isinstance(error, ForwardContextError)
    assert "while 2 are active" in str(error)


def test_backward_after_the_context_has_ended_says_so():
    layer, x = Recorder(), torch.ones(2, requires_grad=True)
    with set_forward_context(current_timestep=7):
        loss = checkpoint(layer, x, use_reentrant=False).sum()
    with pytest.raises(ForwardContextError, match="no forward context"):
        loss.backward()


@pytest.mark.gpu
def test_recomputation_in_autograds_device_thread_sees_the_callers_context():
    layer, x = Recorder(), torch.ones(2, requires_grad=True, device="cuda")
    release, entered = threading.Event(), threading.Event()

    def hold():
        with set_forward_context(current_timestep=8):
            entered.set()
            release.wait(timeout=60)

    other = threading.Thread(target=hold)
    other.start()
    entered.wait(timeout=60)
    with set_forward_context(current_timestep=7):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    release.set()
    other.join()
    assert layer.seen == [7, 7]


def test_layer_compiles_without_graph_break_or_recompilation_over_timesteps():
    torch._dynamo.reset()
    layer = LocalAttention(2, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    q = torch.randn(1, 5, 2, 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(6):
            with set_forward_context(current_timestep=step, attn_metadata=AttentionMetadata(step)):
                assert torch.equal(compiled(q, q, q), layer(q, q, q))


def test_context_can_be_set_inside_a_compiled_function():
    torch._dynamo.reset()
    layer = LocalAttention(2, 8)

    def step(q):
        with set_forward_context(current_timestep=3):
            return layer(q, q, q)

    q = torch.randn(1, 5, 2, 8)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(q), layer(q, q, q))
    assert active_attn_metadata() is None
