"""The kernels on a GPU: the error rule, determinism, compilation, graphs, memory."""

import pytest
import torch
from vsa_scenarios import BASE, CASES, assert_follows_error_rule, make_tensors, run, torch_attention

from attnmux_blocksparse import select_top_blocks
from attnmux_vsa import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder, video_sparse_attention
from attnmux_vsa.ops import select_tiles
from attnmux_vsa.prepare import build_video_tiling
from attnmux_vsa.reference import keep_top_tiles, score_means

pytestmark = pytest.mark.gpu

HALF = BASE.but(grid=(9, 10, 12), head_dim=128, topk=7, dtype=torch.bfloat16)
GPU_CASES = {
    **{
        name: case.but(
            dtype=torch.bfloat16, head_dim=64 if case.head_dim == 32 else case.head_dim, topk=min(case.topk, 2)
        )
        for name, case in CASES.items()
    },
    "partial_d128": HALF,
    "adaptive_d128": HALF.but(policy="adaptive"),
    "float16": HALF.but(dtype=torch.float16),
    "scale_4": HALF.but(magnitude=4.0),
    "scale_16": HALF.but(magnitude=16.0),
    "tile_488": HALF.but(tile=(4, 8, 8), grid=(8, 16, 24), topk=3),
    "tile_448": HALF.but(tile=(4, 4, 8), grid=(8, 16, 24), topk=5),
    "gqa_d128": HALF.but(heads=8, heads_k=2),
    "batch_2": HALF.but(batch=2),
    # the tile divides the grid: fetched from the raster where the card is sm90
    "raster": HALF.but(grid=(8, 16, 12)),
    "raster_no_gate": HALF.but(grid=(8, 16, 12), gate=False),
    "raster_gqa_batch_2": HALF.but(grid=(8, 16, 12), heads=4, heads_k=2, batch=2),
    "raster_packed": HALF.but(grid=(8, 16, 12), layout="packed"),
    "raster_heads_first_batch_2": HALF.but(grid=(8, 16, 12), layout="bhsd", batch=2),
    "raster_float16": HALF.but(grid=(8, 16, 12), dtype=torch.float16),
    "raster_negative_scale": HALF.but(grid=(8, 16, 12), scale=-0.1),
    "raster_scale_16": HALF.but(grid=(8, 16, 12), magnitude=16.0),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_kernels_follow_the_error_rule(name):
    scenario = GPU_CASES[name]
    *tensors, tiling = make_tensors(scenario, "cuda", seed=len(name))
    exact = run(*tensors, tiling, scenario, engine="reference", dtype=torch.float64)
    # the same choice of tiles in all: float64 and float32 means agree far below the gaps of random scores
    yardstick = torch_attention(*tensors, tiling, scenario)
    assert_follows_error_rule(run(*tensors, tiling, scenario, engine="triton"), exact, yardstick)


def test_the_choice_is_that_of_float32_scores_with_exactly_topk_tiles():
    q, k, *_, tiling = make_tensors(HALF.but(grid=(16, 32, 32), heads=4, heads_k=2), "cuda")
    chosen = select_tiles(q, k, tiling, topk=13)
    sizes = tiling.variable_block_sizes
    assert chosen.shape == (1, 4, len(sizes), 13)
    assert (chosen.diff(dim=-1) > 0).all()
    on_cpu = build_video_tiling(tiling.dit_seq_shape, topk=13)
    want = select_tiles(q.cpu().double(), k.cpu().double(), on_cpu, topk=13)
    assert (chosen.cpu() == want).float().mean() > 0.999


@pytest.mark.parametrize("kind", ["ties", "equal", "outliers", "random"])
def test_a_million_rows_keep_exactly_topk(kind):
    """Adversarial rows: with one-hot queries the scores are the keys' own numbers."""
    rows, columns, kept = 250_000 // 64 * 64, 64, 3
    generator = torch.Generator("cuda").manual_seed(0)
    keys = torch.randn(rows // 64, 1, columns, 64, generator=generator, device="cuda")
    if kind == "ties":
        keys = (keys * 2).round()
    elif kind == "equal":
        keys = torch.full_like(keys, -0.0)
    elif kind == "outliers":
        keys = torch.where(keys > 2, 4.0, torch.where(keys < -2, -5.0, 0.0))
    queries = torch.eye(64, device="cuda").expand(rows // 64, 1, 64, 64).contiguous()
    chosen = select_top_blocks(queries, keys.contiguous(), kept)
    assert (chosen.diff(dim=-1) > 0).all()
    want = keep_top_tiles(score_means(queries, keys, 1.0), kept)
    assert torch.equal(chosen.long(), want)


def test_conforming_choice_is_that_of_bfloat16_scores():
    q, k, *_, tiling = make_tensors(HALF.but(grid=(8, 16, 16)), "cuda")
    exact = select_tiles(q, k, tiling, topk=3)
    conform = select_tiles(q, k, tiling, topk=3, conform="bf16-scores")
    assert conform.shape == exact.shape
    assert (conform.diff(dim=-1) > 0).all()
    assert 0.5 < float((conform == exact).float().mean()) <= 1.0


def test_same_input_gives_the_same_bits():
    *tensors, tiling = make_tensors(HALF, "cuda")
    first = run(*tensors, tiling, HALF)
    for _ in range(19):
        for a, b in zip(first, run(*tensors, tiling, HALF), strict=True):
            assert torch.equal(a, b)


def test_nothing_waits_for_the_device():
    *tensors, tiling = make_tensors(HALF, "cuda")
    run(*tensors, tiling, HALF)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*tensors, tiling, HALF)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_follows_new_tokens():
    q, k, v, gate, _, tiling = make_tensors(HALF, "cuda")
    fixed = [x.clone() for x in (q, k, v, gate)]
    with torch.no_grad():
        for _ in range(2):
            video_sparse_attention(*fixed[:3], tiling, gate_compress=fixed[3])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = video_sparse_attention(*fixed[:3], tiling, gate_compress=fixed[3])
        for seed in range(3):
            fresh = make_tensors(HALF, "cuda", seed=seed)[:4]
            for a, b in zip(fixed, fresh, strict=True):
                a.copy_(b)
            graph.replay()
            assert torch.equal(out, video_sparse_attention(*fresh[:3], tiling, gate_compress=fresh[3]))


def test_it_compiles_whole_and_sparsity_and_grid_recompile_nothing():
    torch._dynamo.reset()
    frames = []
    impl = VideoSparseAttentionImpl(2, 128)

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(impl.forward, fullgraph=True, dynamic=True, backend=backend)
    for grid, sparsity in (((8, 16, 16), 0.5), ((8, 16, 16), 0.7), ((8, 16, 24), 0.9), ((4, 8, 16), 0.5)):
        metadata = VideoSparseAttentionMetadataBuilder().build(0, grid, (1, 1, 1), sparsity, "cuda")
        q, k, v = (torch.randn(1, metadata.total_seq_length, 2, 128, device="cuda").bfloat16() for _ in range(3))
        assert torch.equal(compiled(q, k, v, metadata), impl.forward(q, k, v, metadata))
    assert len(frames) <= 2


@pytest.mark.parametrize("grid", [(9, 10, 12), (8, 16, 12)])
@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_passes_opcheck(gated, grid):
    q, k, v, gate, _, tiling = make_tensors(HALF.but(grid=grid, gate=gated), "cuda")
    leaves = [x if x is None else x.requires_grad_() for x in (q, k, v, gate)]
    arguments = (*leaves, tiling.token_of_slot, tiling.slot_grid, tiling.variable_block_sizes, [4, 4, 4], 5, 0.1)
    torch.library.opcheck(torch.ops.attnmux_vsa.forward.default, (*arguments, None, True))


def test_a_layer_keeps_no_buffer_of_another():
    """Results of one call stay as they are while another runs on the same metadata."""
    *tensors, tiling = make_tensors(HALF, "cuda")
    first = run(*tensors, tiling, HALF)
    kept = [x.clone() for x in first]
    run(*make_tensors(HALF, "cuda", seed=5)[:5], tiling, HALF)
    for a, b in zip(first, kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("grid", "forward", "step"), [((32, 32, 32), 1.6, 1.3), ((29, 34, 34), 6.0, 2.0)])
@pytest.mark.parametrize("gated", [False, True])
def test_peak_memory(grid, forward, step, gated):
    """No tensor of all pairs of tiles, and from the raster no copy of a token.

    forward: what a call takes besides its inputs, in sizes of q. step: forward and backward, inputs included, next to dense.
    """
    tiling = build_video_tiling(grid, sparsity=0.9, device="cuda")
    tensors = [torch.randn(1, tiling.total_seq_length, 4, 128, device="cuda").bfloat16() for _ in range(5)]
    q, k, v, dout, gate = tensors if gated else [*tensors[:4], None]

    def peak(run):
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    def attend(*leaves):
        gates = leaves[3] if gated else None
        return video_sparse_attention(*leaves[:3], tiling, gate_compress=gates)

    def dense(q, k, v, *_):
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2)

    def train(run):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, gate) if x is not None]
        return torch.autograd.grad(run(*leaves), leaves, dout, allow_unused=True)

    whole = q.numel() * 2
    with torch.no_grad():
        assert peak(lambda: attend(q, k, v, gate)) <= forward * whole
    if step < 2:
        inputs = whole * (5 if gated else 4)
        assert peak(lambda: train(attend)) + inputs <= step * (peak(lambda: train(dense)) + 4 * whole)
