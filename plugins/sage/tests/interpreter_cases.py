"""The plain Triton kernels in Triton's interpreter, on the CPU. Run by test_kernels.py in a process of its own."""

import os

import numpy as np
import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_kernels.py"

# The interpreter is chosen by the variable above, before triton is imported.
# ruff: noqa: E402
import triton.language as tl
from sage_scenarios import (
    Scenario,
    assert_like_emulation,
    assert_pooling_agrees,
    assert_same_tensors,
    make_lists,
    make_tensors,
)
from triton.runtime import interpreter

from attnmux_sage import kernels, prepare, reference
from attnmux_sage.kernels.configs import TritonConfig
from attnmux_sage.kernels.forward import launch_triton_forward
from attnmux_sage.kernels.quantise import launch_list_scales, launch_quantise

BASE = Scenario(len_q=128, len_k=128)
CASES = {
    "whole": BASE,
    "odd_lengths": BASE.but(len_q=127, len_k=65),
    "one_token": BASE.but(len_q=1, len_k=1),
    "cross_lengths": BASE.but(len_q=65, len_k=190),
    "more_queries": BASE.but(len_q=190, len_k=65),
    "grouped_heads": BASE.but(heads=4, batch=2, len_q=70, len_k=100),
    "heads_first": BASE.but(layout="heads_first", batch=2),
    "padded_heads": BASE.but(layout="padded_heads"),
    "head_size_48": BASE.but(head_size=48, len_q=64, len_k=70),
    "head_size_128": BASE.but(head_size=128, len_q=64, len_k=130),
    "negative_scale": BASE.but(softmax_scale=-0.3),
    "zero_scale": BASE.but(softmax_scale=0.0),
    "large_inputs": BASE.but(input_scale=16.0),
    "float32": BASE.but(dtype=torch.float32, len_q=100),
    "many_blocks": BASE.but(len_q=400, len_k=700, heads=1, heads_k=1),
}
PATTERNS = {"dense": {}, "causal": {"causal": True}, "lists": {"is_listed": True}}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory from torch.empty is NaN, or a number that no tensor here may hold."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        fresh = empty(*args, **kwargs)
        if fresh.dtype == torch.float8_e4m3fn:
            fresh.view(torch.int8).fill_(127)
            return fresh
        return fresh.fill_(float("nan") if fresh.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def e4m3(monkeypatch):
    """The interpreter rounds to e4m3 wrongly where a carry reaches the exponent, and below the normal numbers; PyTorch does not."""
    convert = interpreter._convert_float

    def converted(data, source, target, rounding_mode):
        if target == tl.float8e4nv and source == tl.float32:
            values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.float8e4nv and target == tl.float16:
            values = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn)
            return values.to(torch.float16).view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_quantisation_writes_what_the_emulation_writes(name, pv):
    scenario = CASES[name]
    q, k, v = make_tensors(scenario)
    before = [x.clone() for x in (q, k, v)]
    options = {"softmax_scale": scenario.softmax_scale, "fp8_values": pv == "fp8"}
    found = launch_quantise(q, k, v, **options)
    assert all(map(torch.equal, before, (q, k, v)))
    assert_same_tensors(found, prepare.quantise(q, k, v, **options))


@pytest.mark.parametrize("step", [2, 3, 50])
def test_a_sample_of_the_keys_gives_their_mean(monkeypatch, step):
    for module in (prepare, kernels.quantise):
        monkeypatch.setattr(module, "sample_step", lambda length: step)
    q, k, v = make_tensors(CASES["many_blocks"])
    options = {"softmax_scale": 0.11, "fp8_values": True}
    wanted = prepare.quantise(q, k, v, **options)
    assert_same_tensors(launch_quantise(q, k, v, **options), wanted)
    monkeypatch.setattr(prepare, "sample_step", lambda length: 1)
    assert not torch.equal(prepare.quantise(q, k, v, **options).k8, wanted.k8)


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "float32"])
def test_quantisation_that_pools_writes_the_same(name, pv):
    assert_pooling_agrees(CASES[name], pv, "cpu")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_attention_agrees_with_the_emulation(name, pv, pattern):
    scenario = CASES[name].but(**PATTERNS[pattern])
    q, k, v = make_tensors(scenario, seed=len(name))
    blocks, counts = make_lists(scenario)
    quantised = prepare.quantise(q, k, v, softmax_scale=scenario.softmax_scale, fp8_values=pv == "fp8")
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    options = {"blocks": blocks, "counts": counts, "causal": scenario.causal}
    launch_triton_forward(quantised, v, out, lse, config=TritonConfig(64, 4, 2), **options)
    wanted = reference.attend(quantised, v, len_q=scenario.len_q, keys_per_step=64, **options)
    assert_like_emulation(out, lse, *wanted)


def test_scales_of_a_list_are_those_of_its_blocks():
    scenario = BASE.but(len_q=300, len_k=700, heads=4, is_listed=True, batch=2)
    blocks, counts = make_lists(scenario)
    k_scale = torch.rand(2, 2, 11)
    found = launch_list_scales(blocks, k_scale, 4)
    is_used = torch.arange(blocks.shape[-1]) < counts[..., None]
    wanted = k_scale.repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 3, -1).gather(-1, blocks.long().clamp_max(10))
    assert torch.equal(found[is_used], wanted[is_used])
    # read for an empty list, whose scores are -inf
    assert (found > 0).all()
