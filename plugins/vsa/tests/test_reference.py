import math

import pytest
import torch

import attnmux_vsa.reference as reference
from attnmux_vsa import select_tiles, video_sparse_attention
from attnmux_vsa.prepare import build_video_tiling, count_kept_tiles, count_tiles
from attnmux_vsa.reference import attend_tiles, keep_top_tiles

GRIDS = [(1, 1, 1), (4, 4, 4), (5, 4, 4), (5, 7, 3), (9, 10, 7)]


def tensors(grid, heads=2, kv_heads=None, head_size=8, batch=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    S = math.prod(grid)

    def draw(H):
        return torch.randn(batch, S, H, head_size, generator=generator, dtype=torch.float64).to(dtype)

    return draw(heads), draw(kv_heads or heads), draw(kv_heads or heads), draw(heads)


def dense(q, k, v, scale=None, mask=None):
    """Softmax attention over every key, [B, S, H, D], with the scores written out."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def brute_force(q, k, v, grid, topk, scale=None, gate=None, tile=(4, 4, 4)):
    """Video Sparse Attention by token coordinates and a dense mask; it shares no code with the plugin."""
    B, S, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    T, rows, columns = grid
    counts = [-(-size // step) for size, step in zip(grid, tile, strict=True)]
    tile_of = []
    for t in range(T):
        for h in range(rows):
            tile_of += [((t // tile[0]) * counts[1] + h // tile[1]) * counts[2] + w // tile[2] for w in range(columns)]
    tile_of = torch.tensor(tile_of)
    N = math.prod(counts)
    mask = torch.zeros(B, H, S, S, dtype=torch.bool)
    coarse = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[2])
            mean_q, mean_k, mean_v = (
                torch.stack([x[b, tile_of == n, head].mean(0) for n in range(N)])
                for x, head in ((q, h), (k, g), (v, g))
            )
            scores = mean_q @ mean_k.T * scale
            for n in range(N):
                order = sorted(range(N), key=lambda j: (-scores[n, j].item(), j))[:topk]
                mask[b, h, (tile_of == n)[:, None] & torch.isin(tile_of, torch.tensor(order))] = True
            coarse[b, :, h] = (scores.softmax(-1) @ mean_v)[tile_of]
    out = dense(q, k, v, scale, mask)
    return out if gate is None else out + gate * coarse


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("gated", [False, True])
def test_reference_equals_brute_force(grid, sparsity, gated):
    q, k, v, gate = tensors(grid, batch=2)
    gate = gate if gated else None
    topk = count_kept_tiles(sparsity, math.prod(count_tiles(grid)))
    tiling = build_video_tiling(grid, sparsity=sparsity)
    close(video_sparse_attention(q, k, v, tiling, gate_compress=gate), brute_force(q, k, v, grid, topk, gate=gate))


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_equal_those_of_brute_force(grid):
    inputs = [x.requires_grad_() for x in tensors(grid, heads=4, kv_heads=2, head_size=5)]
    N = math.prod(count_tiles(grid))
    topk = (N + 1) // 2
    weights = torch.randn_like(inputs[0])
    q, k, v, gate = inputs
    ours = video_sparse_attention(q, k, v, build_video_tiling(grid, topk=topk), gate_compress=gate)
    theirs = brute_force(q, k, v, grid, topk, gate=gate)
    for actual, expected in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(theirs, inputs, weights), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(gated):
    grid = (3, 3, 2)
    q, k, v, gate = (x.requires_grad_() for x in tensors(grid, heads=2, kv_heads=1, head_size=3))
    tiling = build_video_tiling(grid, topk=2, tile_size=(2, 2, 2))
    inputs = (q, k, v, gate) if gated else (q, k, v)

    def attend(q, k, v, gate=None):
        return video_sparse_attention(q, k, v, tiling, gate_compress=gate, softmax_scale=0.7)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=False)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_tile_kept_without_gate_is_dense_attention(grid):
    q, k, v, _ = tensors(grid)
    close(video_sparse_attention(q, k, v, build_video_tiling(grid, sparsity=0.0)), dense(q, k, v))


def test_gate_of_zeros_is_no_gate():
    q, k, v, gate = tensors((5, 7, 3))
    tiling = build_video_tiling((5, 7, 3), topk=2)
    without = video_sparse_attention(q, k, v, tiling)
    assert torch.equal(video_sparse_attention(q, k, v, tiling, gate_compress=torch.zeros_like(gate)), without)


def test_gate_enters_linearly():
    q, k, v, gate = tensors((5, 7, 3))
    tiling = build_video_tiling((5, 7, 3), topk=2)
    fine, once, minus_twice = (
        video_sparse_attention(q, k, v, tiling, gate_compress=g) for g in (None, gate, -2.0 * gate)
    )
    close(minus_twice - fine, -2.0 * (once - fine))


@pytest.mark.parametrize("scale", [0.0, 0.03, 2.0, -0.5, 16])
def test_scale_reaches_both_branches(scale):
    q, k, v, gate = tensors((5, 7, 3))
    out = video_sparse_attention(
        q, k, v, build_video_tiling((5, 7, 3), topk=2), gate_compress=gate, softmax_scale=scale
    )
    close(out, brute_force(q, k, v, (5, 7, 3), 2, scale=scale, gate=gate))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_query_heads_each_choose_their_own_tiles(kv_heads):
    grid = (5, 7, 3)
    q, k, v, gate = tensors(grid, heads=6, kv_heads=kv_heads, batch=2)
    tiling = build_video_tiling(grid, topk=2)
    close(video_sparse_attention(q, k, v, tiling, gate_compress=gate), brute_force(q, k, v, grid, 2, gate=gate))
    repeated = [x.repeat_interleave(6 // kv_heads, dim=2) for x in (k, v)]
    close(video_sparse_attention(q, k, v, tiling), video_sparse_attention(q, *repeated, tiling))


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 3, 4), (8, 8, 8), (1, 1, 64)])
def test_other_tiles_equal_brute_force(tile):
    grid = (5, 7, 3)
    q, k, v, gate = tensors(grid)
    N = math.prod(count_tiles(grid, tile))
    tiling = build_video_tiling(grid, topk=(N + 1) // 2, tile_size=tile)
    close(
        video_sparse_attention(q, k, v, tiling, gate_compress=gate),
        brute_force(q, k, v, grid, (N + 1) // 2, gate=gate, tile=tile),
    )


@pytest.mark.parametrize("length", [1, 63, 65, 127, 1000])
def test_odd_lengths_equal_brute_force(length):
    grid = (1, 1, length)
    q, k, v, gate = tensors(grid, heads=1)
    tiling = build_video_tiling(grid, sparsity=0.8)
    close(
        video_sparse_attention(q, k, v, tiling, gate_compress=gate),
        brute_force(q, k, v, grid, tiling.topk, gate=gate),
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_is_never_read(poison):
    tiling = build_video_tiling((5, 7, 3), topk=2)
    sizes = tiling.variable_block_sizes
    padding = torch.arange(64) >= sizes[:, None]
    generator = torch.Generator().manual_seed(3)
    clean = [torch.randn(2, 2, 4, 64, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    dirty = [x.masked_fill(padding[..., None], poison) for x in clean]
    results = []
    for tiles in (clean, dirty):
        leaves = [x.clone().requires_grad_() for x in tiles]
        fine, coarse = attend_tiles(*leaves, sizes, 2, 0.3, with_coarse=True)
        fine = fine[:, :, ~padding]
        results.append((fine, coarse, *torch.autograd.grad(fine.sin().sum() + coarse.sin().sum(), leaves)))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    for gradient in results[1][2:]:
        assert not gradient[:, :, padding].any()


def test_chunks_give_the_output_and_gradients_of_the_whole(monkeypatch):
    grid = (5, 7, 3)
    inputs = [x.requires_grad_() for x in tensors(grid, heads=4, kv_heads=2, batch=2)]
    q, k, v, gate = inputs
    tiling = build_video_tiling(grid, topk=3)

    def run():
        out = video_sparse_attention(q, k, v, tiling, gate_compress=gate)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    whole = run()
    # 4 tiles x 64 tokens x 64 numbers a row: chunks of 3 rows, the last one short.
    monkeypatch.setattr(reference, "_CHUNK_NUMBERS", 3 * 4 * 64 * 64)
    for actual, expected in zip(run(), whole, strict=True):
        close(actual, expected)
    with torch.no_grad():
        close(video_sparse_attention(q, k, v, tiling, gate_compress=gate), whole[0])


def test_chunks_are_recomputed_in_backward_rather_than_kept(monkeypatch):
    grid = (8, 8, 8)
    q, k, v, _ = (x.requires_grad_() for x in tensors(grid, heads=4))
    tiling = build_video_tiling(grid, topk=8)

    def numbers_kept():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            video_sparse_attention(q, k, v, tiling)
        return sum(kept)

    whole = numbers_kept()
    monkeypatch.setattr(reference, "_CHUNK_NUMBERS", 4 * 8 * 64 * 64)
    assert numbers_kept() < whole / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_computed_in_float32_and_rounded_once(dtype):
    grid = (5, 7, 3)
    q, k, v, gate = tensors(grid, dtype=dtype)
    tiling = build_video_tiling(grid, topk=2)
    out = video_sparse_attention(q, k, v, tiling, gate_compress=gate)
    in_float32 = video_sparse_attention(q.float(), k.float(), v.float(), tiling, gate_compress=gate.float())
    assert out.dtype == dtype
    assert torch.equal(out, in_float32.to(dtype))


def test_float32_is_near_float64():
    grid = (9, 10, 7)
    q, k, v, gate = tensors(grid, dtype=torch.float32)
    tiling = build_video_tiling(grid, topk=6)
    out = video_sparse_attention(q, k, v, tiling, gate_compress=gate)
    exact = video_sparse_attention(q.double(), k.double(), v.double(), tiling, gate_compress=gate.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


def test_samples_do_not_see_each_other():
    grid = (5, 7, 3)
    q, k, v, gate = tensors(grid, batch=3)
    tiling = build_video_tiling(grid, topk=2)
    together = video_sparse_attention(q, k, v, tiling, gate_compress=gate)
    for b in range(3):
        alone = video_sparse_attention(*(x[b : b + 1] for x in (q, k, v)), tiling, gate_compress=gate[b : b + 1])
        close(together[b : b + 1], alone)


def test_permuting_the_heads_permutes_the_output():
    grid = (5, 7, 3)
    q, k, v, gate = tensors(grid, heads=4)
    tiling = build_video_tiling(grid, topk=2)
    order = torch.tensor([2, 0, 3, 1])
    out = video_sparse_attention(q, k, v, tiling, gate_compress=gate)
    moved = video_sparse_attention(*(x[:, :, order] for x in (q, k, v)), tiling, gate_compress=gate[:, :, order])
    close(moved, out[:, :, order])


def test_same_input_gives_the_same_bits_and_inputs_are_left_alone():
    grid = (5, 7, 3)
    inputs = [x.requires_grad_() for x in tensors(grid, dtype=torch.float32)]
    before = [x.detach().clone() for x in inputs]
    tiling = build_video_tiling(grid, topk=2)

    def run():
        out = video_sparse_attention(*inputs[:3], tiling, gate_compress=inputs[3])
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
    for x, copy in zip(inputs, before, strict=True):
        assert torch.equal(x, copy)


def test_any_strides_are_read_right():
    grid = (5, 7, 3)
    q, k, v, gate = tensors(grid)
    tiling = build_video_tiling(grid, topk=2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, gate)]
    every_other = [torch.stack((x, x + 1), dim=-1)[..., 0] for x in (q, k, v, gate)]
    expected = video_sparse_attention(q, k, v, tiling, gate_compress=gate)
    for strided in (heads_first, every_other):
        out = video_sparse_attention(*strided[:3], tiling, gate_compress=strided[3])
        assert torch.equal(out, expected)
        assert out.is_contiguous()


def test_empty_batch_gives_an_empty_output():
    q, k, v, gate = (x[:0] for x in tensors((5, 7, 3)))
    assert video_sparse_attention(q, k, v, build_video_tiling((5, 7, 3), topk=2), gate_compress=gate).shape == q.shape


def test_autocast_does_not_lower_the_precision():
    q, k, v, gate = tensors((5, 7, 3), dtype=torch.float32)
    tiling = build_video_tiling((5, 7, 3), topk=2)
    single = build_video_tiling((5, 7, 3), topk=20, tile_size=(1, 1, 1))
    expected = video_sparse_attention(q, k, v, tiling, gate_compress=gate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(video_sparse_attention(q, k, v, tiling, gate_compress=gate), expected)
        kept = select_tiles(q, k, single)
    assert torch.equal(kept, select_tiles(q, k, single))


def test_coarse_softmax_counts_a_short_tile_like_a_full_one():
    # Tiles of 64 and 16 tokens; at scale 0 both weigh one half.
    grid = (5, 4, 4)
    q, k, v, _ = tensors(grid, heads=1)
    tiling = build_video_tiling(grid, topk=1)
    ones = torch.ones_like(q)
    fine, both = (video_sparse_attention(q, k, v, tiling, gate_compress=g, softmax_scale=0.0) for g in (None, ones))
    expected = (v[:, :64].mean(1, keepdim=True) + v[:, 64:].mean(1, keepdim=True)) / 2
    close(both - fine, expected.expand_as(q))


class TestSelection:
    def test_largest_scores_are_kept_in_ascending_order(self):
        scores = torch.tensor([[0.1, 5.0, -2.0, 4.0], [9.0, 1.0, 2.0, 3.0]])
        assert keep_top_tiles(scores, 2).tolist() == [[1, 3], [0, 3]]

    def test_ties_are_kept_by_the_lowest_index(self):
        scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0, 0.0]])
        assert keep_top_tiles(scores, 4).tolist() == [[0, 1, 2, 4], [0, 1, 2, 3]]

    @pytest.mark.parametrize("N", [2, 17, 64, 300])
    @pytest.mark.parametrize(
        "kind", ["equal", "few values", "outliers", "bfloat16", "denormal", "infinite", "nan", "all nan"]
    )
    def test_adversarial_rows_keep_exactly_k_by_value_then_index(self, N, kind):
        generator = torch.Generator().manual_seed(N)
        noise = torch.randn(8, N, generator=generator)
        scores = {
            "equal": torch.zeros(8, N),
            "few values": noise.sign(),
            "outliers": torch.where(noise > 2, 1e30, noise * 1e-3),
            "bfloat16": noise.bfloat16().float(),
            "denormal": noise.sign() * 1e-42,
            "infinite": torch.where(noise > 1, torch.inf, torch.where(noise < -1, -torch.inf, noise)),
            "nan": torch.where(noise > 1, torch.nan, noise.round()),
            "all nan": torch.full((8, N), torch.nan),
        }[kind]
        for topk in {1, 2, N // 2, N - 1, N} - {0}:
            kept = keep_top_tiles(scores, topk)
            assert kept.shape == (8, topk)
            for row, chosen in zip(scores.tolist(), kept.tolist(), strict=True):
                rank = sorted(range(N), key=lambda j: (0, 0.0, j) if math.isnan(row[j]) else (1, -row[j], j))
                assert chosen == sorted(rank[:topk])

    def test_select_tiles_says_what_attention_reads(self):
        grid = (9, 10, 7)
        q, k, v, _ = tensors(grid, heads=4, kv_heads=2)
        tiling = build_video_tiling(grid, topk=3)
        kept = select_tiles(q, k, tiling)
        assert kept.shape == (1, 4, 18, 3)
        tile_of_token = tiling.slot_of_token // 64
        # Poison every token that query token 100, head 3 does not keep: it must not notice.
        ignored = ~torch.isin(tile_of_token, kept[0, 3, tile_of_token[100]])
        poisoned = v.masked_fill(ignored[None, :, None, None], torch.nan)
        close(
            video_sparse_attention(q, k, poisoned, tiling)[0, 100, 3],
            video_sparse_attention(q, k, v, tiling)[0, 100, 3],
        )

    def test_negative_scale_keeps_the_least_alike(self):
        grid = (5, 7, 3)
        q, k, _, _ = tensors(grid, heads=1)
        tiling = build_video_tiling(grid, topk=2)
        positive, negative = (select_tiles(q, k, tiling, softmax_scale=scale)[0, 0] for scale in (1.0, -1.0))
        for kept, dropped in zip(positive.tolist(), negative.tolist(), strict=True):
            assert sorted(kept + dropped) == [0, 1, 2, 3]
