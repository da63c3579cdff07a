"""The GPU kernels against the emulation of their arithmetic; needs an NVIDIA card. Run with `pytest -m gpu`."""

import pytest
import torch
from sage_accuracy import CASES as ACCURACY
from sage_accuracy import assert_accurate
from sage_scenarios import (
    Scenario,
    assert_like_emulation,
    assert_pooling_agrees,
    assert_same_tensors,
    make_lists,
    make_tensors,
)

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import BlockIndex
from attnmux_sage import SageSLAAttentionImpl, prepare, reference, sage_attention

pytestmark = pytest.mark.gpu

BASE = Scenario(len_q=1000, len_k=1000, head_size=128, dtype=torch.bfloat16)
SCENARIOS = {
    "base": BASE.but(batch=2),
    "whole": BASE.but(len_q=1024, len_k=1024),
    "one_token": BASE.but(len_q=1, len_k=1),
    "63x65": BASE.but(len_q=63, len_k=65),
    "127x640": BASE.but(len_q=127, len_k=640),
    "129x128": BASE.but(len_q=129, len_k=128),
    "cross": BASE.but(batch=2, len_q=640),
    "grouped_heads": BASE.but(batch=2, len_q=500, len_k=700, heads=8),
    "head_size_64": BASE.but(batch=2, len_q=500, heads=4, heads_k=4, head_size=64),
    "head_size_80": BASE.but(len_q=300, len_k=500, heads=3, heads_k=3, head_size=80),
    "head_size_24": BASE.but(len_q=300, len_k=500, head_size=24),
    "float16": BASE.but(len_q=500, len_k=600, dtype=torch.float16),
    "packed": BASE.but(len_q=500, len_k=600, layout="packed"),
    "heads_first": BASE.but(len_q=500, len_k=600, layout="heads_first"),
    "negative_scale": BASE.but(len_q=500, len_k=600, softmax_scale=-0.09),
}
PATTERNS = {"dense": {}, "causal": {"causal": True}, "lists": {"is_listed": True}}


def poison_the_allocator():
    for size in (2**12, 2**16, 2**20, 2**22, 2**24):
        blocks = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
        del blocks


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_quantisation_writes_what_the_emulation_writes(name, pv):
    from attnmux_sage.kernels.quantise import launch_quantise

    scenario = SCENARIOS[name]
    q, k, v = make_tensors(scenario, "cuda")
    before = [x.clone() for x in (q, k, v)]
    poison_the_allocator()
    options = {"softmax_scale": scenario.softmax_scale, "fp8_values": pv == "fp8"}
    found = launch_quantise(q, k, v, **options)
    assert all(map(torch.equal, before, (q, k, v)))
    assert_same_tensors(found, prepare.quantise(q, k, v, **options))


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("name", [name for name, x in SCENARIOS.items() if x.head_size % 16 == 0])
def test_quantisation_that_pools_writes_the_same(name, pv):
    poison_the_allocator()
    assert_pooling_agrees(SCENARIOS[name], pv, "cuda")


def run(engine, quantised, q, v, **options):
    from attnmux_sage.kernels.forward import launch_triton_forward
    from attnmux_sage.kernels.hopper_forward import launch_hopper_forward

    out = torch.full(q.shape, float("nan"), device="cuda", dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), device="cuda")
    launch = launch_hopper_forward if engine == "hopper" else launch_triton_forward
    launch(quantised, v, out, lse, **options)
    torch.cuda.synchronize()
    return out, lse


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("engine", ["triton", "hopper"])
def test_attention_agrees_with_the_emulation(engine, name, pattern, pv):
    scenario = SCENARIOS[name].but(**PATTERNS[pattern])
    if engine == "hopper" and scenario.causal:
        pytest.skip("causal calls are for the plain engine")
    q, k, v = make_tensors(scenario, "cuda")
    quantised = prepare.quantise(q, k, v, softmax_scale=scenario.softmax_scale, fp8_values=pv == "fp8")
    blocks, counts = make_lists(scenario, "cuda")
    poison_the_allocator()
    options = {"blocks": blocks, "counts": counts}
    out, lse = run(engine, quantised, q, v, **options, **({"causal": True} if scenario.causal else {}))
    wanted = reference.attend(
        quantised,
        v,
        len_q=scenario.len_q,
        causal=scenario.causal,
        keys_per_step=128 if engine == "hopper" else 64,
        **options,
    )
    assert_like_emulation(out, lse, *wanted)


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("programs", [1, 3])
def test_few_programs_walk_many_tiles(programs, is_listed, pv):
    scenario = BASE.but(len_q=1500, is_listed=is_listed)
    q, k, v = make_tensors(scenario, "cuda")
    quantised = prepare.quantise(q, k, v, softmax_scale=0.11, fp8_values=pv == "fp8")
    blocks, counts = make_lists(scenario, "cuda")
    out, lse = run("hopper", quantised, q, v, blocks=blocks, counts=counts, multiprocessors=programs)
    assert_like_emulation(out, lse, *reference.attend(quantised, v, len_q=1500, blocks=blocks, counts=counts))
    again, _ = run("hopper", quantised, q, v, blocks=blocks, counts=counts, multiprocessors=5 - programs)
    assert torch.equal(out, again)


@pytest.mark.parametrize("pv", ["fp8", "bf16"])
@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy_is_that_of_the_goals(name, pv):
    # as the emulation on a CPU, on the same numbers
    assert_accurate(name, pv, "cuda", length=4096)


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_cuda_graph_gives_the_bits_of_the_call(is_listed):
    scenario = BASE.but(is_listed=is_listed)
    q, k, v = make_tensors(scenario, "cuda")
    index = None
    if is_listed:
        index = BlockIndex(*make_lists(scenario, "cuda"), num_key_blocks=16, block_q=128, block_k=64)
    with torch.no_grad():
        expected = sage_attention(q, k, v, index=index)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sage_attention(q, k, v, index=index)
    graph.replay()
    assert torch.equal(out, expected)
    other = make_tensors(scenario, "cuda", seed=3)
    for x, y in zip((q, k, v), other, strict=True):
        x.copy_(y)
    graph.replay()
    assert torch.equal(out, sage_attention(*other, index=index))


def test_other_lengths_compile_no_kernel():
    from attnmux_sage.kernels import hopper_forward, quantise

    def compiled():
        kernels = (hopper_forward._sage_hopper_fwd_kernel, quantise._sage_quantise_kernel, quantise._sage_stats_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    for length in (512, 515):
        sage_attention(*make_tensors(BASE.but(len_q=length, len_k=length), "cuda"))
    before = compiled()
    for length in (384, 1000, 1111):
        sage_attention(*make_tensors(BASE.but(len_q=length, len_k=length), "cuda"))
    assert compiled() == before


def test_the_sla_layer_is_captured_and_close_to_its_reference():
    layer = SageSLAAttentionImpl(2, 128, topk_ratio=0.3).cuda()
    torch.nn.init.normal_(layer.proj_l.weight, std=0.1)
    slow = SageSLAAttentionImpl(2, 128, topk_ratio=0.3, engine="reference").cuda()
    slow.load_state_dict(layer.state_dict())
    q, k, v = make_tensors(BASE, "cuda")
    expected = layer(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(q, k, v)
    graph.replay()
    assert torch.equal(out, expected)
    wanted = slow(q, k, v).float()
    assert (out.float() - wanted).norm() / wanted.norm() < 1e-2


def test_fp8_values_are_refused_with_a_hint_on_older_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    q, k, v = make_tensors(BASE.but(len_q=64, len_k=64), "cuda")
    with pytest.raises(UnsupportedRequestError, match=r"compute capability \(8, 6\).*use pv='bf16'"):
        sage_attention(q, k, v, pv="fp8", engine="triton")
