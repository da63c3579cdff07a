"""The kernels in Triton's interpreter, on the CPU. Run by test_kernels.py in a process of its own."""

import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_kernels.py"

# The interpreter is chosen by the variable above, before triton is imported.
# ruff: noqa: E402
from sla_scenarios import Scenario, assert_call_is_right, forward_and_backward, make_tensors

from attnmux_sla import ops, reference
from attnmux_sla.kernels import launch
from attnmux_sla.prepare import pool_blocks

BASE = Scenario()
CASES = {
    "whole_blocks": BASE,
    "odd_lengths": BASE.but(len_q=127, len_k=65),
    "one_token": BASE.but(len_q=1, len_k=1, dtype=torch.float16),
    "cross_lengths": BASE.but(len_q=65, len_k=190),
    "grouped_heads": BASE.but(heads=4, batch=2, len_q=70, len_k=100),
    "heads_first": BASE.but(layout="heads_first", batch=2),
    "packed": BASE.but(layout="packed"),
    "head_size_48": BASE.but(head_size=48, len_q=64, len_k=70),
    "elu": BASE.but(feature_map="elu", len_q=100),
    "relu": BASE.but(feature_map="relu", len_q=100),
    "relu_48": BASE.but(feature_map="relu", head_size=48, len_q=64, len_k=65),
    "elu_48": BASE.but(feature_map="elu", head_size=48, len_q=64, len_k=65),
    "blocks_64x128": BASE.but(block_q=64, block_k=128),
    "blocks_256x256": BASE.but(block_q=256, block_k=256, len_q=300, len_k=270),
    "no_projection": BASE.but(projects=False),
    "several_splits": BASE.but(len_q=1100, len_k=1100, heads=1, heads_k=1),
    "negative_scale": BASE.but(softmax_scale=-0.3),
    # the features of q and of the few keys hardly overlap, so that the denominator is about eps
    "small_mass": BASE.but(len_q=64, len_k=2, input_scale=6.0),
    "float16": BASE.but(dtype=torch.float16),
    "float16_large": BASE.but(dtype=torch.float16, input_scale=16.0, len_q=100),
    "float16_elu_large": BASE.but(dtype=torch.float16, input_scale=16.0, feature_map="elu", len_k=100),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Let the operators run the kernels on the CPU; the sparse branch stays the reference's."""
    monkeypatch.setattr(ops, "choose_engine", lambda name, *_: "reference" if name == "reference" else "triton")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory from torch.empty is NaN, or a number that no list may hold."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        fresh = empty(*args, **kwargs)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_oracle(name):
    scenario = CASES[name]
    tensors = make_tensors(scenario, seed=len(name))
    out, grads = forward_and_backward(tensors[:5], tensors[5], scenario.options)
    assert_call_is_right(scenario, tensors, out, grads)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 65, 300])
def test_pooling_divides_by_the_true_length(block, length):
    x = rows(2, length, 3, 16)
    torch.testing.assert_close(launch.pool(x, block), pool_blocks(x, block))


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_the_state_is_the_sum_over_keys(feature_map):
    k, v = rows(1, 1030, 2, 16), rows(1, 1030, 2, 16, seed=1)
    for ours, theirs in zip(
        launch.summarize_keys(k, v, 64, feature_map, True),
        reference.summarize_keys(k, v, 64, feature_map, True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
