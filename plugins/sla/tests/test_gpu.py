"""The GPU engine against the oracle; needs an NVIDIA card. Run with `pytest -m gpu`."""

import pytest
import torch
from sla_scenarios import Scenario, assert_call_is_right, forward_and_backward, make_tensors, same_blocks

from attnmux.errors import UnsupportedRequestError
from attnmux.testing import assert_close_to_oracle, poisoned_memory
from attnmux.testing.tolerance import ErrorMeasure
from attnmux_sla import SLAAttentionImpl, SLAAttentionMetadata, get_block_map, select_blocks, sparse_linear_attention

pytestmark = pytest.mark.gpu

BASE = Scenario(batch=2, len_q=1000, len_k=1000, head_size=128, dtype=torch.bfloat16)
CASES = {
    "base": BASE,
    "scale_4": BASE.but(input_scale=4.0),
    "scale_16": BASE.but(input_scale=16.0),
    "whole_blocks": BASE.but(len_q=1024, len_k=1024),
    "one_token": BASE.but(len_q=1, len_k=1),
    "63x65": BASE.but(len_q=63, len_k=65),
    "127x640": BASE.but(len_q=127, len_k=640),
    "many_splits": BASE.but(batch=1, len_q=4000, len_k=3000, topk_ratio=0.1),
    "grouped_heads": BASE.but(heads=8),
    "elu": BASE.but(feature_map="elu"),
    "elu_16": BASE.but(feature_map="elu", input_scale=16.0),
    "relu": BASE.but(feature_map="relu"),
    "relu_16": BASE.but(feature_map="relu", input_scale=16.0),
    "no_projection": BASE.but(projects=False),
    "64x64": BASE.but(block_q=64),
    "128x128": BASE.but(block_k=128),
    "256x256": BASE.but(block_q=256, block_k=256),
    "heads_first": BASE.but(layout="heads_first"),
    "packed": BASE.but(layout="packed"),
    "every_other_token": BASE.but(layout="every_other_token"),
    "softmax_scale": BASE.but(softmax_scale=0.2),
    "negative_scale": BASE.but(softmax_scale=-0.1),
    "zero_scale": BASE.but(softmax_scale=0.0),
    "fp16": BASE.but(dtype=torch.float16),
    "fp16_16": BASE.but(dtype=torch.float16, input_scale=16.0),
    "fp16_elu_16": BASE.but(dtype=torch.float16, feature_map="elu", input_scale=16.0),
    "d64": BASE.but(head_size=64),
    "d64_16": BASE.but(head_size=64, input_scale=16.0),
    "d80": BASE.but(head_size=80),
    "d16_relu": BASE.but(head_size=16, feature_map="relu"),
    "complement": BASE.but(linear_keys="complement"),
    "marginal": BASE.but(linear_keys="marginal"),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_oracle(name):
    scenario = CASES[name]
    tensors = make_tensors(scenario, "cuda", seed=len(name))
    assert same_blocks(scenario, *tensors[:2])
    with poisoned_memory():
        out, grads = forward_and_backward(tensors[:5], tensors[5], scenario.options)
    assert_call_is_right(scenario, tensors, out, grads)


def test_long_rows_are_chosen_as_in_float64():
    q, k = (torch.randn(1, 20000, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ours, exact = select_blocks(q, k), select_blocks(q.double(), k.double(), engine="reference")
    pooled = [torch.ops.attnmux_sla.pool(x.double(), block, "reference") for x, block in ((q, 128), (k, 64))]
    scores = pooled[0] @ pooled[1].transpose(-1, -2)
    # where float32 chooses another block, its score is the same up to rounding
    found, wanted = (scores.gather(-1, index.blocks.long()).sort(-1).values for index in (ours, exact))
    assert_close_to_oracle(found.float(), wanted, ErrorMeasure())


def test_the_public_map_is_that_of_the_lists():
    q, k = (torch.randn(1, 2, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    block_map, lists, topk = get_block_map(q, k, 0.3)
    assert block_map.sum(-1).eq(topk).all()
    assert block_map.gather(-1, lists).eq(1).all()


def test_twenty_runs_give_the_same_bits():
    scenario = BASE.but(len_q=3000, len_k=3000, heads=4, batch=1)
    *inputs, dout = make_tensors(scenario, "cuda")
    first, first_grads = forward_and_backward(inputs, dout, scenario.options)
    for _ in range(19):
        out, grads = forward_and_backward(inputs, dout, scenario.options)
        assert torch.equal(out, first)
        assert all(map(torch.equal, grads, first_grads))


def test_a_graph_replay_chooses_blocks_anew():
    scenario = BASE.but(len_q=1024, len_k=1024, batch=1)
    *inputs, dout = make_tensors(scenario, "cuda")
    static = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            forward_and_backward(static, dout, scenario.options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_grads = forward_and_backward(static, dout, scenario.options)
    seen = set()
    for seed in range(1, 4):
        *fresh, _ = make_tensors(scenario, "cuda", seed=seed)
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        out, grads = forward_and_backward(fresh, dout, scenario.options)
        assert torch.equal(captured, out)
        assert all(map(torch.equal, captured_grads, grads))
        seen.add(tuple(select_blocks(fresh[0], fresh[1]).blocks.flatten().tolist()))
    assert len(seen) == 3


@pytest.mark.parametrize("linear_keys", ["all", "marginal"])
def test_nothing_waits_for_the_device(linear_keys):
    scenario = BASE.but(linear_keys=linear_keys)
    *inputs, dout = make_tensors(scenario, "cuda")
    forward_and_backward(inputs, dout, scenario.options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(inputs, dout, scenario.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_lengths_and_ratios_compile_no_kernel_again():
    from attnmux_blocksparse.kernels import select
    from attnmux_sla.kernels import linear

    kernels = [x for module in (linear, select) for name, x in vars(module).items() if name.endswith("_kernel")]

    def compiled():
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    def run(length, ratio):
        scenario = BASE.but(len_q=length, len_k=length, topk_ratio=ratio)
        *inputs, dout = make_tensors(scenario, "cuda")
        forward_and_backward(inputs, dout, scenario.options)

    run(640, 0.5)
    before = compiled()
    assert sum(before) > 0
    for length, ratio in ((1000, 0.1), (1, 1.0), (65, 0.9), (4096, 0.03), (2500, 0.2)):
        run(length, ratio)
    assert compiled() == before


def test_offsets_beyond_31_bits_are_addressed():
    torch.cuda.empty_cache()
    buffer = torch.zeros(256, 2**24, device="cuda", dtype=torch.bfloat16)
    scenario = BASE.but(batch=1, heads=1, heads_k=1, len_q=256, len_k=256, topk_ratio=0.5)
    tensors = make_tensors(scenario, "cuda")
    parts = [buffer[:, i * 128 : (i + 1) * 128].view(1, 256, 1, 128) for i in range(3)]
    for part, x in zip(parts, tensors, strict=False):
        part.copy_(x)
    out, grads = forward_and_backward([*parts, *tensors[3:5]], tensors[5], scenario.options)
    expected, expected_grads = forward_and_backward(tensors[:5], tensors[5], scenario.options)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, grads, expected_grads))


def test_compiled_calls_are_the_same_and_do_not_recompile():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    impl = SLAAttentionImpl(2, 128).cuda()
    compiled = torch.compile(impl, fullgraph=True, dynamic=True, backend=backend)
    for step, length in enumerate((1000, 1500, 1300)):
        q, k, v = make_tensors(BASE.but(len_q=length, len_k=2 * length), "cuda")[:3]
        metadata = SLAAttentionMetadata(step, 0.3)
        out = compiled(q.requires_grad_(), k, v, metadata)
        assert torch.equal(out, impl(q, k, v, metadata))
    assert len(graphs) == 1


def test_float16_is_computed_in_bfloat16_unless_told_otherwise():
    q, k, v = make_tensors(BASE.but(dtype=torch.float16), "cuda")[:3]
    default, exact = SLAAttentionImpl(2, 128).cuda(), SLAAttentionImpl(2, 128, use_bf16=False).cuda()
    assert default(q, k, v).dtype == torch.float16
    assert torch.equal(default(q, k, v), default(*(x.bfloat16() for x in (q, k, v))).half())
    assert torch.equal(exact(q, k, v), sparse_linear_attention(q, k, v, exact.proj_l.weight, exact.proj_l.bias))


def test_a_named_engine_raises_with_every_reason():
    q = torch.randn(1, 64, 1, 72, device="cuda")
    with pytest.raises(UnsupportedRequestError, match="head_dim=72") as caught:
        sparse_linear_attention(q, q, q, engine="triton")
    assert {"dtype", "head_size"} <= {reason.code for reason in caught.value.reasons}
