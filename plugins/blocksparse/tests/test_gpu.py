"""The GPU engines against the oracle; needs an NVIDIA card. Run with `pytest -m gpu`."""

import pytest
import torch
from blocksparse_scenarios import Scenario, assert_call_is_right, make_tensors
from raster_scenarios import make_raster

from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import BlockIndex, block_sparse_attention, reference, select_top_blocks
from attnmux_blocksparse.kernels import KernelRequest, is_supported

pytestmark = pytest.mark.gpu

BASE = Scenario(batch=2, len_q=1000, len_k=1000, heads=2, heads_k=2, head_dim=128, dtype=torch.bfloat16)
COMMON = {
    "64x64": BASE,
    "128x64": BASE.but(block_q=128),
    "128x128": BASE.but(block_q=128, block_k=128),
    "64x128": BASE.but(block_k=128),
    "256x256": BASE.but(block_q=256, block_k=256),
    "64x256": BASE.but(block_k=256),
    "256x64": BASE.but(block_q=256),
    "whole_blocks": BASE.but(len_q=1024, len_k=1024, block_q=128),
    "one_token": BASE.but(len_q=1, len_k=1, batch=1, heads=1, heads_k=1),
    "one_token_128": BASE.but(len_q=1, len_k=1, batch=1, heads=1, heads_k=1, block_q=128, block_k=128),
    "63x65": BASE.but(len_q=63, len_k=65),
    "127x640": BASE.but(len_q=127, len_k=640, block_q=128),
    "cross_64": BASE.but(len_q=640, len_k=1000),
    "gqa_64": BASE.but(heads=8, heads_k=2),
    "gqa_128": BASE.but(heads=8, heads_k=2, block_q=128),
    "empty_rows_64": BASE.but(empty_rows=True),
    "empty_rows_128": BASE.but(empty_rows=True, block_q=128),
    "partial_64": BASE.but(partial=True),
    "partial_128": BASE.but(partial=True, block_q=128),
    "partial_128x128": BASE.but(partial=True, block_q=128, block_k=128),
    "partial_finite_64": BASE.but(partial=True, finite_padding=True),
    "partial_finite_128": BASE.but(partial=True, finite_padding=True, block_q=128),
    "heads_first": BASE.but(layout="bhsd", block_q=128),
    "packed": BASE.but(layout="packed", block_q=128),
    "packed_64": BASE.but(layout="packed"),
    "shared": BASE.but(shared=True, block_q=128),
    "sparse": BASE.but(keep=0.1, len_q=2000, len_k=2000),
    "sparse_128": BASE.but(keep=0.1, len_q=2000, len_k=2000, block_q=128),
    "fp16_64": BASE.but(dtype=torch.float16),
    "fp16_128": BASE.but(dtype=torch.float16, block_q=128),
    "fp16_partial": BASE.but(dtype=torch.float16, block_q=128, partial=True),
    "scale_4": BASE.but(magnitude=4.0, block_q=128),
    "scale_16": BASE.but(magnitude=16.0, block_q=128),
    "scale_4_64": BASE.but(magnitude=4.0),
    "scale_16_64": BASE.but(magnitude=16.0),
    "d64_64x64": BASE.but(head_dim=64),
    "d64_128x64": BASE.but(head_dim=64, block_q=128),
    "d64_128x128": BASE.but(head_dim=64, block_q=128, block_k=128),
    "d64_partial": BASE.but(head_dim=64, partial=True),
    "d64_partial_128": BASE.but(head_dim=64, partial=True, block_q=128),
    "d64_empty_gqa": BASE.but(head_dim=64, empty_rows=True, heads=4, heads_k=1, block_q=128),
}
TRITON_ONLY = {
    "d16": BASE.but(head_dim=16),
    "d48": BASE.but(head_dim=48, block_q=128),
    "d80": BASE.but(head_dim=80),
    "d96_partial": BASE.but(head_dim=96, partial=True),
    "d256": BASE.but(head_dim=256),
    "d256_128": BASE.but(head_dim=256, block_q=128, block_k=128, dtype=torch.float16),
    "negative_scale": BASE.but(softmax_scale=-0.1),
    "zero_scale": BASE.but(softmax_scale=0.0),
}
ALL = [("triton", name, s) for name, s in (COMMON | TRITON_ONLY).items()] + [
    ("hopper", name, s) for name, s in COMMON.items()
]


def skip_unless_supported(engine, q, k, v, index, scale):
    request = KernelRequest(q, k, v, index.block_q, index.block_k, scale)
    reasons = [r for r in is_supported(engine, request) if r.code == "architecture"]
    if reasons:
        pytest.skip(str(reasons[0]))


def poison_the_allocator():
    """Freed blocks keep their contents: what a kernel leaves unwritten reads as NaN."""
    for size in (2**12, 2**16, 2**20, 2**22, 2**24, 2**26):
        blocks = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
        del blocks


def run(q, k, v, dout, index, scale, engine):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*leaves, index, softmax_scale=scale, return_lse=True, engine=engine)
    grads = torch.autograd.grad(out, leaves, dout)
    return out.detach(), lse.detach(), grads


@pytest.mark.parametrize(("engine", "name", "scenario"), ALL, ids=[f"{e}-{n}" for e, n, _ in ALL])
def test_engine_agrees_with_the_oracle(engine, name, scenario):
    q, k, v, dout, index = make_tensors(scenario, "cuda", seed=len(name))
    skip_unless_supported(engine, q, k, v, index, scenario.scale)
    poison_the_allocator()
    out, lse, grads = run(q, k, v, dout, index, scenario.scale, engine)
    torch.cuda.synchronize()
    assert_call_is_right(q, k, v, dout, index, scenario.scale, out, lse, grads)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("name", [n for n, s in COMMON.items() if s.head_dim == 128 or s.block_q > 64])
def test_few_programs_walk_many_tiles(name, programs):
    """The persistent grid of the Hopper forward, where one program goes through many tiles."""
    from attnmux_blocksparse.kernels.arguments import IndexTensors
    from attnmux_blocksparse.kernels.hopper_forward import launch_hopper_forward

    scenario = COMMON[name].but(even_rows=True)
    q, k, v, dout, index = make_tensors(scenario, "cuda", seed=len(name))
    skip_unless_supported("hopper", q, k, v, index, scenario.scale)
    tensors = IndexTensors(
        index.blocks,
        index.counts,
        index.block_q,
        index.block_k,
        index.q_lengths,
        index.k_lengths,
        index.finite_padding,
        True,
    )
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device="cuda")
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), device="cuda")
    launch_hopper_forward(q, k, v, out, lse, tensors, softmax_scale=scenario.scale, multiprocessors=programs)
    torch.cuda.synchronize()
    _, _, grads = run(q, k, v, dout, index, scenario.scale, "hopper")
    assert_call_is_right(q, k, v, dout, index, scenario.scale, out, lse, grads)


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("engine", ["triton", "hopper"])
def test_twenty_runs_give_the_same_bits(engine, block_q):
    scenario = BASE.but(block_q=block_q, len_q=2000, len_k=2000, heads=4, heads_k=2)
    q, k, v, dout, index = make_tensors(scenario, "cuda")
    skip_unless_supported(engine, q, k, v, index, scenario.scale)
    out, lse, grads = run(q, k, v, dout, index, scenario.scale, engine)
    for _ in range(19):
        again, lse_again, grads_again = run(q, k, v, dout, index, scenario.scale, engine)
        for a, b in zip((out, lse, *grads), (again, lse_again, *grads_again), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("engine", ["triton", "hopper"])
def test_a_graph_replay_follows_lists_changed_in_place(engine, block_q):
    scenario = BASE.but(block_q=block_q, len_q=1024, len_k=1024)
    q, k, v, dout, index = make_tensors(scenario, "cuda")
    skip_unless_supported(engine, q, k, v, index, scenario.scale)
    others = [make_tensors(scenario, "cuda", seed=s)[4].to_block_mask() for s in range(1, 6)]
    width = 16
    index = BlockIndex.from_block_mask(index.to_block_mask(), block_q=block_q, block_k=64, width=width)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(q, k, v, dout, index, scenario.scale, engine)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(q, k, v, dout, index, scenario.scale, engine)
    for mask in others:
        changed = BlockIndex.from_block_mask(mask, block_q=block_q, block_k=64, width=width)
        index.blocks.copy_(changed.blocks)
        index.counts.copy_(changed.counts)
        graph.replay()
        torch.cuda.synchronize()
        out, lse, grads = run(q, k, v, dout, changed, scenario.scale, engine)
        for a, b in zip((captured[0], captured[1], *captured[2]), (out, lse, *grads), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ["triton", "hopper"])
def test_offsets_beyond_31_bits_are_addressed(engine):
    """Inputs strided over 2**32 elements, and outputs of more than 2**31."""
    torch.cuda.empty_cache()
    buffer = torch.zeros(256, 2**24, device="cuda", dtype=torch.bfloat16)
    parts = [buffer[:, i * 128 : (i + 1) * 128].view(1, 256, 1, 128) for i in range(3)]
    for part in parts:
        part.copy_(torch.randn(1, 256, 1, 128, device="cuda"))
    dout = torch.randn(1, 256, 1, 128, device="cuda", dtype=torch.bfloat16)
    mask = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool, device="cuda")
    index = BlockIndex.from_block_mask(mask, block_q=128, block_k=128)
    skip_unless_supported(engine, *parts, index, 0.1)
    out, lse, grads = run(*parts, dout, index, 0.1, engine)
    assert_call_is_right(*parts, dout, index, 0.1, out, lse, grads)
    del buffer, parts, out, lse, grads
    torch.cuda.empty_cache()
    length = 1_400_064
    del dout
    q, k, v, dout = (torch.randn(1, length, 12, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    blocks = length // 64
    own = torch.arange(blocks, device="cuda", dtype=torch.int32)
    lists = torch.stack([(own - 1).clamp(min=0), own], -1)[None, None].contiguous()
    counts = torch.full((1, 1, blocks), 2, dtype=torch.int32, device="cuda")
    lists[0, 0, 0, 0], counts[0, 0, 0] = 0, 1
    index = BlockIndex(lists, counts, num_key_blocks=blocks, block_q=64, block_k=64)
    out, lse, grads = run(q, k, v, dout, index, 128**-0.5, engine)
    # The last two query blocks on their own; query block i reads key blocks i - 1 and i.
    tail = slice(length - 192, length)
    local = BlockIndex.from_block_mask(
        torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool, device="cuda"), block_q=64, block_k=64
    )
    part = run(*(x[:, tail] for x in (q, k, v, dout)), local, 128**-0.5, engine)
    assert torch.equal(out[:, length - 128 :], part[0][:, 64:])
    assert torch.equal(lse[..., length - 128 :], part[1][..., 64:])
    assert torch.equal(grads[0][:, length - 128 :], part[2][0][:, 64:])
    for got, want in zip(grads[1:], part[2][1:], strict=True):
        assert torch.equal(got[:, length - 64 :], want[:, 128:])


@pytest.mark.parametrize("engine", ["triton", "hopper"])
def test_the_lists_of_some_heads_give_the_bits_of_these_heads(engine):
    generator = torch.Generator("cuda").manual_seed(0)
    mask = torch.rand(1, 4, 16, 16, device="cuda", generator=generator) < 0.4
    index = BlockIndex.from_block_mask(mask, block_q=64, block_k=64)

    def run(first, last, lists):
        generator = torch.Generator("cuda").manual_seed(1)
        tensors = [
            torch.randn(2, 1000, 4, 128, device="cuda", generator=generator).bfloat16()[:, :, first:last]
            for _ in range(4)
        ]
        q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
        out = block_sparse_attention(q, k, v, lists, engine=engine)
        return [out, *torch.autograd.grad(out, (q, k, v), tensors[3])]

    for x, y in zip(run(1, 3, index.of_heads(1, 3)), run(0, 4, index), strict=True):
        assert torch.equal(x, y[:, :, 1:3])


def test_transposed_lists_are_those_of_the_cpu():
    _, _, _, _, index = make_tensors(BASE.but(len_q=5000, len_k=7000, block_k=128, empty_rows=True), "cpu")
    on_gpu = BlockIndex(
        index.blocks.cuda(), index.counts.cuda(), num_key_blocks=index.num_key_blocks, block_q=64, block_k=128
    )
    offsets, entries, order = index.transpose()
    got = on_gpu.transpose()
    assert torch.equal(got.offsets.cpu(), offsets)
    assert torch.equal(got.order.cpu(), order)
    is_used = torch.arange(entries.shape[-1]) < offsets[..., -1:]
    assert torch.equal(got.entries.cpu()[is_used], entries[is_used])


def test_nothing_waits_for_the_device():
    q, k, v, dout, index = make_tensors(BASE, "cuda")
    run(q, k, v, dout, index, 0.1, None)
    fresh = BlockIndex(
        index.blocks.clone(), index.counts.clone(), num_key_blocks=index.num_key_blocks, block_q=64, block_k=64
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, v, dout, fresh, 0.1, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_calls_do_not_recompile_for_lengths_and_widths():
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def call(q, k, v, index):
        return block_sparse_attention(q, k, v, index, return_lse=True)

    # No two sizes of the first call agree: torch takes equal sizes for one symbol.
    for length, keep in ((1000, 0.5), (1500, 0.2), (1300, 0.8)):
        q, k, v, _, index = make_tensors(BASE.but(len_q=length, len_k=2 * length, keep=keep), "cuda")
        out, _ = call(q.requires_grad_(), k, v, index)
        assert torch.equal(out, block_sparse_attention(q, k, v, index))
    assert len(compiled_graphs) == 1


def test_a_named_engine_raises_with_every_reason():
    q = torch.randn(1, 64, 1, 72, device="cuda")
    index = BlockIndex.from_block_mask(torch.ones(1, 1, dtype=torch.bool, device="cuda"), block_q=64, block_k=64)
    with pytest.raises(UnsupportedRequestError, match=r"head_dim=72.*") as caught:
        block_sparse_attention(q, q, q, index, engine="hopper")
    assert {"dtype", "head_size"} <= {reason.code for reason in caught.value.reasons}


@pytest.mark.parametrize("n_k", [1, 64, 500, 1200, 4000, 4100])
def test_selected_blocks_are_those_of_the_cpu(n_k):
    """Whole numbers, so that sums are exact in any order and ties are common."""
    generator = torch.Generator().manual_seed(n_k)
    q = torch.randint(-3, 4, (1, 4, 100, 128), generator=generator).float()
    k = torch.randint(-3, 4, (1, 2, n_k, 128), generator=generator).float()
    topk = max(1, n_k // 10)
    want = select_top_blocks(q, k, topk, protected=min(2, topk))
    assert torch.equal(select_top_blocks(q.cuda(), k.cuda(), topk, protected=min(2, topk)).cpu(), want)


@pytest.mark.parametrize(("n_q", "n_k", "heads_k"), [(1, 1, 1), (33, 500, 4), (17, 1200, 2), (40, 3001, 4)])
def test_selected_lists_are_exact_with_ties(n_q, n_k, heads_k):
    # small whole numbers: products and sums are exact in float32, and every row has many equal scores
    generator = torch.Generator("cuda").manual_seed(n_k)
    q, k = (
        torch.randint(-2, 3, (2, heads, n, 128), generator=generator, device="cuda").float()
        for heads, n in ((4, n_q), (heads_k, n_k))
    )
    for kept in sorted({1, max(1, n_k // 10), n_k}):
        for order in (1.0, -1.0, 0.0):
            for protected in (0, min(3, kept)):
                lists = torch.ops.attnmux_blocksparse.select(q, k, kept, protected, order)
                assert torch.equal(lists, reference.select(q, k, kept, protected, order))


def test_selection_takes_nan_scores_first():
    q, k = torch.ones(1, 1, 20, 16, device="cuda"), torch.ones(1, 1, 200, 16, device="cuda")
    k[..., 150, 3], k[..., 170, 2] = torch.nan, -torch.nan
    lists = select_top_blocks(q, k, 3)
    assert (lists == torch.tensor([0, 150, 170], device="cuda")).all()


def test_a_selected_score_that_underflows_equals_zero():
    q, k = torch.zeros(1, 1, 1, 16, device="cuda"), torch.zeros(1, 1, 200, 16, device="cuda")
    q[..., 0], k[..., :100, 0] = 1e-30, -1e-30
    lists = select_top_blocks(q, k, 150)
    assert torch.equal(lists.flatten(), torch.arange(150, device="cuda"))


@pytest.mark.parametrize(
    ("grid", "tile", "dtype"),
    [
        ((8, 16, 12), (4, 4, 4), torch.bfloat16),
        ((8, 16, 12), (4, 4, 4), torch.float16),
        ((4, 16, 24), (4, 8, 8), torch.bfloat16),
        ((8, 8, 16), (4, 4, 8), torch.bfloat16),
        ((4, 8, 32), (1, 4, 16), torch.bfloat16),
        ((4, 4, 4), (4, 4, 4), torch.bfloat16),
    ],
)
def test_tiles_in_the_raster_are_attended_to_like_tiles_in_a_row(grid, tile, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper engine's")
    from attnmux_blocksparse.kernels import launch
    from attnmux_blocksparse.kernels.backward import launch_stats

    (q, k, v, dout), tokens, flat, raster = make_raster(grid, tile, head_dim=128, dtype=dtype, device="cuda")
    rows = [x[:, tokens].contiguous() for x in (q, k, v, dout)]
    scale = 0.1
    out, lse = launch.attention_forward("hopper", *rows[:3], flat, scale)
    got, got_lse = launch.attention_forward("hopper", q, k, v, raster, scale)
    assert torch.equal(got[:, tokens], out)
    assert torch.equal(got_lse, lse)
    stats = launch_stats(got, dout, lse, None, raster.raster)
    for a, b in zip(stats, launch_stats(out, rows[3], lse, None), strict=True):
        assert torch.equal(a[..., : len(tokens)], b[..., : len(tokens)])
    wanted = [torch.empty_like(x) for x in rows[:3]]
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    launch.attention_gradients("hopper", rows[3], *stats, *rows[:3], *wanted, flat, scale)
    launch.key_gradients(rows[3], *stats, rows[0], k, v, *grads[1:], raster, scale)
    launch.query_gradients("hopper", dout, *stats, q, k, v, grads[0], raster, scale)
    for a, b in zip(grads, wanted, strict=True):
        assert torch.equal(a[:, tokens], b)
