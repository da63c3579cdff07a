"""The GPU engine against the oracle; needs an NVIDIA card. Run with `pytest -m gpu`."""

import pytest
import torch
from vmoba_oracle import PAIRS

from attnmux.testing import (
    assert_close_to_oracle,
    dense_attention_baseline,
    dense_attention_oracle,
    make_inputs,
    measure_error,
)
from attnmux_vmoba import moba_attention, select_chunks
from attnmux_vmoba.ops import attend_chunks
from attnmux_vmoba.prepare import Selection, from_chunk_order, pack_bits, resolve_chunks, self_chunks, to_chunk_order
from attnmux_vmoba.reference import choose_chunks, gate_chunks

pytestmark = pytest.mark.gpu

# name: (grid, chunk size, topk, heads, key heads, head size, batch)
SHAPES = {
    "temporal_in_place": ((5, 16, 16), 1, 2, 4, 4, 128, 2),
    "temporal_short": ((5, 9, 17), 1.3, 3, 2, 2, 128, 2),
    "temporal_end": ((1, 1, 1000), 0.256, 2, 2, 2, 128, 1),
    "spatial": ((6, 8, 16), (4, 8), 2, 4, 2, 128, 2),
    "spatial_padded": ((5, 10, 9), (5, 3), 3, 4, 1, 64, 2),
    "st": ((4, 12, 16), (2, 6, 8), 3, 2, 2, 128, 1),
    "st_small": ((4, 12, 16), (2, 2, 4), 5, 2, 2, 64, 2),
    "st_many_chunks": ((8, 16, 16), (1, 4, 2), 7, 2, 2, 128, 1),
    "head_80": ((4, 8, 8), (2, 4, 4), 3, 2, 2, 80, 1),
    "head_256": ((4, 8, 8), (4, 4), 2, 2, 1, 256, 1),
    "one_token": ((1, 1, 1), 1, 1, 1, 1, 128, 1),
    "everything": ((4, 8, 8), (2, 4, 4), 99, 2, 2, 128, 1),
    "own_alone": ((4, 8, 8), (2, 4, 4), 1, 2, 2, 128, 1),
}


def make(name, dtype=torch.bfloat16, magnitude=1.0, layout="contiguous"):
    grid, chunk_size, topk, heads, heads_kv, D, batch = SHAPES[name]
    chunks = resolve_chunks(grid, chunk_size)
    inputs = make_inputs(
        batch=batch, length_q=chunks.length, length_k=chunks.length, num_heads=heads, num_kv_heads=heads_kv, head_size=D,
        dtype=dtype, device="cuda", input_scale=magnitude, layout=layout, seed=len(name),
    )  # fmt: skip
    return inputs, chunks, {"patch_resolution": grid, "chunk_size": chunk_size, "topk": topk}


def assert_choice_is_exact(found, q, k, chunks, how):
    """The float64 choice, but for entries that float32 cannot tell from the last one kept."""
    exact = choose_chunks(gate_chunks(q.double(), k.double(), chunks), self_chunks(chunks, q.device), how)
    if torch.equal(found, exact):
        return
    # what a rounding of every gate by a few float32 steps of its terms could change
    size = gate_chunks(q.double().abs(), k.double().abs(), chunks)
    gates = gate_chunks(q.double(), k.double(), chunks)
    unclear = torch.zeros_like(found)
    for sign in (-1.0, 1.0):
        for seed in range(4):
            noise = torch.randn(gates.shape, generator=torch.Generator().manual_seed(seed)).to(gates) * sign
            shaken = gates + 4.0 * torch.finfo(torch.float32).eps * size * noise
            unclear |= choose_chunks(shaken, self_chunks(chunks, q.device), how) != exact
    unclear = unclear.any(2, keepdim=True)
    assert float(unclear.double().mean()) < 0.02, "the data decides nothing"
    assert not ((found != exact) & ~unclear).any()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_choice_is_that_of_float64(name, dtype):
    inputs, chunks, options = make(name, dtype)
    q, k, _ = inputs
    assert_choice_is_exact(
        select_chunks(q, k, **options, engine="triton"), q, k, chunks, Selection(topk=options["topk"])
    )
    for threshold in (0.0, 0.25, 0.6, 1.0):
        how = Selection("threshold", threshold=threshold)
        found = select_chunks(q, k, **options, select_mode="threshold", threshold=threshold, engine="triton")
        assert_choice_is_exact(found, q, k, chunks, how)


MODES = {"topk": {}, "threshold": {"select_mode": "threshold", "threshold": 0.4}}


def token_mask(chosen, chunks):
    """Chosen chunks [B, H, C, S] in chunk order -> who sees whom, [B, H, S, S] in raster order."""
    S = chunks.length
    chunk_of = torch.arange(S, device=chosen.device) // chunks.chunk_tokens
    mask = chosen[:, :, chunk_of]  # [B, H, keys, queries]
    place = from_chunk_order(torch.arange(S, device=chosen.device)[None], chunks)[0]
    return mask[:, :, place][..., place].transpose(2, 3)


def assert_call_is_right(run, inputs, mask):
    dout = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(3)).to(inputs.q)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = dense_attention_oracle(*exact, attn_mask=mask)
    truths = torch.autograd.grad(truth, exact, dout.double())
    yard = [x.detach().clone().requires_grad_() for x in inputs]
    baseline = dense_attention_baseline(*yard, attn_mask=mask)
    baselines = torch.autograd.grad(baseline, yard, dout)
    assert_close_to_oracle(out.detach(), truth.detach(), baseline.detach())
    size = float(dout.double().square().mean().sqrt() * inputs.v.double().square().mean().sqrt())
    for name, x, y, z in zip("qkv", grads, truths, baselines, strict=True):
        assert_close_to_oracle(x, y, measure_error(z, y), kind="gradient", what=f"gradient of {name}", term_size=size)


@pytest.fixture(params=["operator", "indexed"])
def path(request, monkeypatch):
    """Both ways to attend with a top-k per query, whatever the chunks."""
    from attnmux_vmoba.kernels import launch

    monkeypatch.setattr(launch, "takes_operator", lambda *_: request.param == "operator")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", SHAPES)
def test_topk_agrees_with_the_dense_mask(name):
    inputs, chunks, options = make(name)
    chosen = select_chunks(inputs.q, inputs.k, **options, engine="triton")
    assert_call_is_right(lambda *x: moba_attention(*x, **options, engine="triton"), inputs, token_mask(chosen, chunks))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "magnitude", "layout"), [
    (torch.float16, 1.0, "contiguous"), (torch.bfloat16, 4.0, "packed"), (torch.bfloat16, 16.0, "heads_first"),
    (torch.bfloat16, 1.0, "every_other_token"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["temporal_in_place", "spatial"])
def test_topk_agrees_in_other_types_sizes_and_strides(name, dtype, magnitude, layout):
    inputs, chunks, options = make(name, dtype, magnitude, layout)
    chosen = select_chunks(inputs.q, inputs.k, **options, engine="triton")
    assert_call_is_right(lambda *x: moba_attention(*x, **options), inputs, token_mask(chosen, chunks))


@pytest.mark.parametrize(("mode", "scope"), PAIRS)
def test_every_mode_and_scope_agrees_with_the_dense_mask(mode, scope):
    inputs, chunks, options = make("st_small")
    options |= {"select_mode": mode, "threshold_type": scope}
    chosen = select_chunks(inputs.q, inputs.k, **options)
    assert 0.05 < float(chosen.double().mean()) < 0.95
    assert_call_is_right(lambda *x: moba_attention(*x, **options), inputs, token_mask(chosen, chunks))


@pytest.mark.parametrize("least_kept", [1, 99])
@pytest.mark.parametrize(
    "name", ["temporal_short", "spatial_padded", "st_small", "st_many_chunks", "head_80", "head_256"]
)
def test_thresholds_agree_with_the_dense_mask(name, least_kept, monkeypatch):
    """With room for all pairs, and with units that have none."""
    from attnmux_vmoba.kernels import launch

    monkeypatch.setattr(launch, "LEAST_KEPT", least_kept)
    inputs, chunks, options = make(name)
    options |= {"select_mode": "threshold", "threshold": 0.5, "engine": "triton"}
    chosen = select_chunks(inputs.q, inputs.k, **options)
    assert_call_is_right(lambda *x: moba_attention(*x, **options), inputs, token_mask(chosen, chunks))


@pytest.mark.parametrize("least_kept", [1, 99])
@pytest.mark.parametrize("name", ["temporal_short", "spatial_padded", "st_small"])
def test_thresholds_agree_on_the_operator(name, least_kept, monkeypatch):
    from attnmux_vmoba.kernels import launch

    for variable, value in (("LEAST_KEPT", least_kept), ("OPERATOR_CHUNK_TOKENS", 0), ("BACKWARD_SHARE", 1e9)):
        monkeypatch.setattr(launch, variable, value)
    inputs, chunks, options = make(name)
    options |= {"select_mode": "threshold", "threshold": 0.5, "engine": "triton"}
    chosen = select_chunks(inputs.q, inputs.k, **options)
    assert_call_is_right(lambda *x: moba_attention(*x, **options), inputs, token_mask(chosen, chunks))


@pytest.mark.parametrize("waste", [1.3, 1e9])
@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize(
    "name", ["temporal_in_place", "temporal_end", "spatial", "st", "st_many_chunks", "head_80", "head_256"]
)
def test_walked_ranges_agree_with_the_dense_mask(name, mode, waste, monkeypatch):
    """Every second range of 128 queries agrees but for two; then those that do not agree are walked too."""
    from attnmux_vmoba.kernels import launch

    for variable, value in (("FORWARD_WASTE", waste), ("BACKWARD_WASTE", waste), ("OPERATOR_CHUNK_TOKENS", 10**9)):
        monkeypatch.setattr(launch, variable, value)
    inputs, chunks, options = make(name)
    options |= {"engine": "triton"} | MODES[mode]
    in_order = to_chunk_order(inputs.q, chunks).clone()
    for first in range(0, chunks.length, 256):
        in_order[:, first + 2 : first + 128] = in_order[:, first : first + 1]
    inputs = inputs._replace(q=from_chunk_order(in_order, chunks))
    chosen = select_chunks(inputs.q, inputs.k, **options)
    assert_call_is_right(lambda *x: moba_attention(*x, **options), inputs, token_mask(chosen, chunks))


def run_with_gradients(inputs, options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = moba_attention(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("mode", MODES)
def test_ten_runs_give_the_same_bits(mode):
    inputs, _, options = make("st_small")
    options |= MODES[mode]
    first = run_with_gradients(inputs, options)
    for _ in range(9):
        for x, y in zip(run_with_gradients(inputs, options), first, strict=True):
            assert torch.equal(x, y)


def assert_nothing_waits(inputs, options):
    run_with_gradients(inputs, options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_with_gradients(inputs, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["temporal_in_place", "spatial", "st_small"])
def test_nothing_waits_for_the_device(name, mode):
    inputs, _, options = make(name)
    assert_nothing_waits(inputs, options | MODES[mode] | {"engine": "triton"})


@pytest.mark.parametrize(("mode", "scope"), PAIRS)
def test_no_scope_waits_for_the_device(mode, scope):
    inputs, _, options = make("st_small")
    assert_nothing_waits(inputs, options | {"select_mode": mode, "threshold_type": scope})


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_replay_follows_its_inputs(mode):
    inputs, _, options = make("spatial")
    options |= MODES[mode]
    static = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run_with_gradients(static, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_with_gradients(static, options)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        for x in static:
            x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
        graph.replay()
        for x, y in zip(captured, run_with_gradients([x.clone() for x in static], options), strict=True):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("path")
def test_an_uneven_choice_is_right():
    """All queries want one chunk: its list is as long as the sequence, others hold their own queries alone."""
    inputs, chunks, options = make("st_small")
    q, k, _v = inputs
    q, k = q.abs(), k.clone()
    hot = torch.arange(chunks.length, device="cuda") // chunks.chunk_tokens == 3
    k[:, from_chunk_order(hot[None], chunks)[0]] = 2.0
    options["topk"] = 2
    chosen = select_chunks(q, k, **options)
    assert chosen[:, :, 3].all()
    assert_call_is_right(
        lambda *x: moba_attention(*x, **options, engine="triton"), inputs._replace(q=q, k=k), token_mask(chosen, chunks)
    )


def test_compiled_call_gives_the_same():
    inputs, chunks, options = make("spatial")
    how = Selection(topk=options["topk"])
    compiled = torch.compile(lambda *x: attend_chunks(*x, chunks, how), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), moba_attention(*inputs, **options))


def test_bits_are_packed_the_same_way():
    inputs, chunks, options = make("st_many_chunks")
    words = torch.ops.attnmux_vmoba.select(
        inputs.q, inputs.k, chunks.grid, chunks.box, "topk", "query_head", 7, 0.0, False, "triton"
    )
    assert words.shape[2] == 8
    assert torch.equal(words, pack_bits(select_chunks(inputs.q, inputs.k, **options)))
