"""The kernels on a GPU: the error rule, determinism, compilation, graphs, memory."""

import pytest
import torch
from vsa_scenarios import BASE, CASES, assert_follows_error_rule, make_tensors, run, torch_attention

from attnmux import set_forward_context
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


@pytest.mark.parametrize("gate", [False, True])
def test_operators_pass_opcheck(gate):
    q, _, _, gates, _, tiling = make_tensors(HALF, "cuda")
    tables = (tiling.token_of_slot, tiling.slot_of_token, tiling.variable_block_sizes)
    q = q.requires_grad_()
    torch.library.opcheck(torch.ops.attnmux_vsa.tile.default, (q, *tables, gate))
    means = [torch.randn(1, 2, 9, 128, device="cuda", requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.attnmux_vsa.coarse.default, (*means, 0.1))
    fine = torch.randn(1, len(tables[0]), 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    coarse = torch.randn(1, 2, len(tables[2]), 128, device="cuda", requires_grad=True)
    optional = (coarse, gates.requires_grad_()) if gate else (None, None)
    torch.library.opcheck(torch.ops.attnmux_vsa.untile.default, (fine, *optional, *tables))


def test_a_layer_keeps_no_buffer_of_another():
    """Results of one call stay as they are while another runs on the same metadata."""
    *tensors, tiling = make_tensors(HALF, "cuda")
    first = run(*tensors, tiling, HALF)
    kept = [x.clone() for x in first]
    run(*make_tensors(HALF, "cuda", seed=5)[:5], tiling, HALF)
    for a, b in zip(first, kept, strict=True):
        assert torch.equal(a, b)


def test_peak_memory_of_forward_and_index():
    """No tensor of all pairs of tiles: the peak of a call is a small multiple of q."""
    metadata = VideoSparseAttentionMetadataBuilder().build(0, (32, 32, 32), (1, 1, 1), 0.9, "cuda")
    q, k, v = (torch.randn(1, 32768, 4, 128, device="cuda").bfloat16() for _ in range(3))
    impl = VideoSparseAttentionImpl(4, 128)
    with torch.no_grad(), set_forward_context(current_timestep=0, attn_metadata=metadata):
        impl.forward(q, k, v, metadata)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        impl.forward(q, k, v, metadata)
        extra = torch.cuda.max_memory_allocated() - before
    # three tiled inputs, the fine branch, the output
    assert extra <= 5.5 * q.numel() * 2
