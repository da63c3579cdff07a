"""The reference against Python loops and one dense mask, and the rules of the choice."""

import pytest
import torch
from vmoba_oracle import CHUNK_SIZES, GRID, PAIRS, attend, choose, chunk_of_tokens, make_tensors

from attnmux.errors import UnsupportedRequestError
from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle
from attnmux_vmoba import moba_attention, process_moba_output, select_chunks
from attnmux_vmoba.prepare import Selection, pack_bits, resolve_chunks, self_chunks, unpack_bits
from attnmux_vmoba.reference import choose_chunks


def chosen_by_us(q, k, chunk_size, mode, scope, **options):
    found = select_chunks(
        q, k, patch_resolution=GRID, chunk_size=chunk_size, select_mode=mode, threshold_type=scope, **options
    )
    _B, _H, _C, _S = found.shape
    in_raster = process_moba_output(found.permute(0, 3, 1, 2), GRID, chunk_size)
    return in_raster.permute(0, 2, 3, 1)


def run(q, k, v, chunk_size, mode, scope, **options):
    return moba_attention(
        q, k, v, patch_resolution=GRID, chunk_size=chunk_size, select_mode=mode, threshold_type=scope, **options
    )


@pytest.mark.parametrize("kind", CHUNK_SIZES)
@pytest.mark.parametrize(("mode", "scope"), PAIRS)
def test_choice_is_that_of_the_loops(kind, mode, scope):
    q, k, _, _ = make_tensors()
    chunk_of = chunk_of_tokens(GRID, CHUNK_SIZES[kind])
    for topk, threshold in ((2, 0.25), (3, 0.5), (99, 1.0), (1, 0.0)):
        ours = chosen_by_us(q, k, CHUNK_SIZES[kind], mode, scope, topk=topk, threshold=threshold)
        assert torch.equal(ours, choose(q, k, chunk_of, mode, scope, topk, threshold))


@pytest.mark.parametrize("kind", CHUNK_SIZES)
@pytest.mark.parametrize(("mode", "scope"), PAIRS)
def test_output_and_gradients_are_those_of_the_dense_mask(kind, mode, scope):
    q, k, v, dout = make_tensors(seed=1)
    chunk_of = chunk_of_tokens(GRID, CHUNK_SIZES[kind])
    leaves, exact = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    out = run(*leaves, CHUNK_SIZES[kind], mode, scope, topk=2, threshold=0.4, softmax_scale=0.3)
    chosen = choose(q, k, chunk_of, mode, scope, 2, 0.4)
    # one that keeps everything or the own chunks alone would test less
    assert chunk_share(chosen) > 1 / chosen.shape[2]
    assert not chosen.all()
    truth = attend(*exact, chosen, chunk_of, 0.3)
    assert_close_to_oracle(out.detach(), truth.detach(), truth.detach())
    ours, theirs = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(truth, exact, dout)
    for name, x, y in zip("qkv", ours, theirs, strict=True):
        assert_close_to_oracle(x, y, y, kind="gradient", what=f"gradient of {name}")


def chunk_share(chosen):
    return float(chosen.double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1.0, 4.0, 16.0])
def test_lower_precision_obeys_the_error_rule(dtype, magnitude):
    q, k, v, _ = (magnitude * x for x in make_tensors(seed=2))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    chunk_of = chunk_of_tokens(GRID, (2, 3))
    truth = attend(q, k, v, choose(q, k, chunk_of, "topk", "query_head", 2), chunk_of)
    assert_close_to_oracle(run(q, k, v, (2, 3), "topk", "query_head", topk=2), truth, dense_attention_baseline(q, k, v))


def test_large_scores_cost_float32_no_precision():
    """Gradients that compute scores of some hundreds in float32 are off by a hundred times what is allowed here."""
    inputs = [16.0 * x.float() for x in make_tensors(seed=2)]
    found, exact = ([x.to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64))
    grads, truths = (
        torch.autograd.grad(run(*x[:3], (2, 3), "topk", "query_head", topk=2), x[:3], x[3]) for x in (found, exact)
    )
    for name, x, y in zip("qkv", grads, truths, strict=True):
        assert_close_to_oracle(x, y, y, kind="gradient", what=f"gradient of {name}")


def test_gradients_pass_gradcheck():
    grid = (2, 2, 4)
    q, k, v, _ = make_tensors(B=1, D=3, seed=3, heads_kv=1, grid=grid)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"patch_resolution": grid, "chunk_size": (1, 2, 2), "topk": 2}
    assert torch.autograd.gradcheck(lambda *x: moba_attention(*x, **options), leaves)


@pytest.mark.parametrize("heads_kv", [1, 2])
def test_every_query_head_of_a_group_chooses_for_itself(heads_kv):
    q, k, v, _ = make_tensors(H=4, heads_kv=heads_kv, seed=4)
    chunk_of = chunk_of_tokens(GRID, (2, 3))
    chosen = choose(q, k, chunk_of, "topk", "query_head", 2)
    assert not torch.equal(chosen[:, 0], chosen[:, 1])
    truth = attend(q, k, v, chosen, chunk_of)
    assert_close_to_oracle(run(q, k, v, (2, 3), "topk", "query_head", topk=2), truth, truth)


@pytest.mark.parametrize(("mode", "scope"), PAIRS)
def test_a_sample_does_not_depend_on_the_others(mode, scope):
    q, k, v, _ = make_tensors(B=3, seed=5)
    options = {"topk": 2, "threshold": 0.4}
    together = run(q, k, v, (2, 3), mode, scope, **options)
    for b in range(3):
        alone = run(*(x[b : b + 1] for x in (q, k, v)), (2, 3), mode, scope, **options)
        assert torch.equal(together[b : b + 1], alone)
    other = [torch.cat([x[:1], 100.0 * x[1:]]) for x in (q, k, v)]
    assert torch.equal(run(*other, (2, 3), mode, scope, **options)[:1], together[:1])


@pytest.mark.parametrize("scope", ["query_head", "head_global"])
@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_scopes_within_a_head_do_not_depend_on_other_heads(mode, scope):
    q, k, v, _ = make_tensors(H=4, seed=6)
    whole = run(q, k, v, (2, 3), mode, scope, topk=2)
    halves = [run(*(x[:, :, i : i + 2] for x in (q, k, v)), (2, 3), mode, scope, topk=2) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves, 2))


@pytest.mark.parametrize(("mode", "scope"), PAIRS)
def test_everything_kept_is_dense_attention(mode, scope):
    q, k, v, _ = make_tensors(seed=7)
    truth = dense_attention_oracle(q, k, v)
    assert_close_to_oracle(run(q, k, v, (2, 2, 3), mode, scope, topk=99, threshold=1.0), truth, truth)


class TestChoice:
    """`choose_chunks` on gates made by hand."""

    OWN = self_chunks(resolve_chunks((1, 1, 8), 0.25), torch.device("cpu"))  # 4 chunks of 2 tokens

    def choose(self, gates, mode="topk", scope="query_head", topk=2, threshold=0.25, keeps_one=False):
        return choose_chunks(gates, self.OWN, Selection(mode, scope, topk, threshold, keeps_one))

    def test_the_own_chunk_is_kept_though_its_gate_is_least(self):
        gates = torch.zeros(1, 1, 4, 8).masked_fill(self.OWN, -5.0)
        for mode, scope in PAIRS:
            assert (self.choose(gates, mode, scope, topk=1, threshold=0.0) == self.OWN).all()

    def test_equal_gates_keep_the_lower_chunks(self):
        kept = self.choose(torch.ones(1, 1, 4, 8), topk=2)[0, 0]
        assert kept[:, 0].tolist() == [True, True, False, False]
        assert kept[:, 6].tolist() == [True, False, False, True]

    def test_minus_zero_ties_with_zero(self):
        gates = torch.zeros(1, 1, 4, 8)
        gates[..., 1, :] = -0.0
        assert torch.equal(self.choose(gates), self.choose(torch.zeros(1, 1, 4, 8)))

    @pytest.mark.parametrize("scope", ["query_head", "head_global", "overall", "block"])
    def test_equal_gates_under_a_threshold_keep_everything(self, scope):
        assert self.choose(torch.ones(1, 2, 4, 8), "threshold", scope, threshold=0.01).all()

    def test_an_entry_is_kept_while_the_share_before_it_is_below_the_threshold(self):
        # of query 0: own 0, others 1, 0.5, 0.25; the sum is 1.75
        gates = torch.tensor([0.0, 1.0, 0.5, 0.25]).reshape(1, 1, 4, 1).expand(1, 1, 4, 8)
        for threshold, count in ((0.0, 1), (0.5, 2), (0.6, 3), (0.85, 3), (0.9, 4)):
            assert self.choose(gates, "threshold", threshold=threshold)[0, 0, :, 0].sum() == count

    def test_own_gates_count_towards_the_threshold(self):
        gates = torch.tensor([1.0, 0.5, 0.25, 0.0]).reshape(1, 1, 4, 1).expand(1, 1, 4, 8)
        assert self.choose(gates, "threshold", threshold=0.5)[0, 0, :, 0].tolist() == [True, False, False, False]
        assert self.choose(gates, "threshold", threshold=0.6)[0, 0, :, 0].tolist() == [True, True, False, False]

    def test_a_budget_of_a_head_goes_where_gates_are_large(self):
        gates = torch.zeros(1, 1, 4, 8)
        gates[0, 0, :, 0] = 10.0
        gates[0, 0, 2, :] += 1.0
        kept = self.choose(gates, scope="head_global", topk=2)[0, 0]
        assert kept[:, 0].all()
        assert kept.sum() == 16

    def test_a_nan_ranks_first(self):
        gates = torch.zeros(1, 1, 4, 8)
        gates[0, 0, 3, 0] = float("nan")
        assert self.choose(gates)[0, 0, :, 0].tolist() == [True, False, False, True]
        assert self.choose(gates, "threshold")[0, 0, :, 0].all()


@pytest.mark.parametrize("chunks", [1, 31, 32, 33, 64, 80])
def test_bits_come_back(chunks):
    chosen = torch.rand(2, 3, chunks, 7, generator=torch.Generator().manual_seed(chunks)) < 0.5
    words = pack_bits(chosen)
    assert words.shape == (2, 3, -(-chunks // 32), 7)
    assert words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, chunks), chosen)


def test_a_named_engine_never_falls_back():
    q, k, v, _ = make_tensors(dtype=torch.float32)
    options = {"patch_resolution": GRID, "chunk_size": (2, 3), "engine": "triton"}
    with pytest.raises(UnsupportedRequestError, match="the scope is 'overall'"):
        select_chunks(q, k, **options, threshold_type="overall")
    with pytest.raises(UnsupportedRequestError, match="the scope is 'block'"):
        moba_attention(q, k, v, **options, select_mode="threshold", threshold_type="block")
    with pytest.raises(UnsupportedRequestError, match="engine 'triton' cannot run this call.*NVIDIA GPU is needed"):
        moba_attention(q, k, v, **options)
