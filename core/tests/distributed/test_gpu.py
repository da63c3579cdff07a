"""Strategies on GPUs: over NCCL where every rank has one, else over gloo with ranks that share it."""

import pytest

# strategy, causal, text, groups of heads
CASES = [
    ("ulysses", False, 5, 1),
    ("ulysses", False, 5, 2),
    ("ring", False, 5, 1),
    ("allgather_kv", False, 5, 1),
    ("ulysses", True, 0, 2),
    ("ring", True, 0, 1),
    ("allgather_kv", True, 0, 1),
]
OVERLAPS = [("ulysses", 1), ("ulysses", 2), ("ring", 1), ("allgather_kv", 1)]


def available(backend):
    from attnmux import AttentionRequest, select_backend
    from attnmux.errors import AttnmuxError

    request = AttentionRequest(head_size=64, dtype="bfloat16", device="cuda")
    try:
        select_backend(request, backend=backend)
    except AttnmuxError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["TORCH_SDPA", "FLASH_ATTN"])
@pytest.mark.parametrize(("strategy", "causal", "text", "overlap"), CASES, ids=str)
def test_two_ranks_match_float64_in_bfloat16(gpu_pools, strategy, causal, text, overlap, backend):
    available(backend)
    gpu_pools(2).run("strategy", strategy, backend, causal, text, overlap)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [1, 2])
@pytest.mark.parametrize(
    "backend",
    ["VIDEO_SPARSE_ATTN", "SLA_ATTN", "BLOCK_SPARSE_ATTN", "VMOBA_ATTN", "SAGE_ATTN", "SAGE_SLA_ATTN"],
)
def test_sparse_backends_give_the_bits_of_one_process(gpu_pools, backend, overlap):
    available(backend)
    gpu_pools(2).run("sparse", backend, overlap)


@pytest.mark.gpu
def test_the_exchanges_run_over_nccl_with_one_rank_and_in_a_cuda_graph(gpu_pools):
    gpu_pools(1).run("one_rank")


@pytest.mark.gpu
@pytest.mark.parametrize(("strategy", "overlap"), OVERLAPS)
def test_a_compiled_layer_over_two_ranks_matches(gpu_pools, strategy, overlap):
    gpu_pools(2).run("compiled", strategy, overlap)


@pytest.mark.multigpu(2)
@pytest.mark.parametrize(("strategy", "overlap"), OVERLAPS)
def test_a_layer_over_two_gpus_runs_in_a_cuda_graph(gpu_pools, strategy, overlap):
    gpu_pools(2).run("captured", strategy, overlap)


@pytest.mark.multigpu(2)
def test_a_rank_that_died_ends_the_others_within_the_timeout(gpu_pools):
    ((waited, message),) = gpu_pools(2).run("left_alone", dies=1)
    assert waited < 2 + 5
    assert "to_heads failed on rank 0 of 2" in message


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather_kv"])
def test_four_gpus_match_float64_in_bfloat16(gpu_pools, strategy):
    gpu_pools(4).run("strategy", strategy, "TORCH_SDPA", False, 5, 1)
