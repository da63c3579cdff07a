"""Strategies on GPUs: over NCCL where every rank has one, else over gloo with ranks that share it."""

import pytest

CASES = [
    ("ulysses", False, 5),
    ("ring", False, 5),
    ("allgather_kv", False, 5),
    ("ulysses", True, 0),
    ("ring", True, 0),
    ("allgather_kv", True, 0),
]


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
@pytest.mark.parametrize(("strategy", "causal", "text"), CASES, ids=str)
def test_two_ranks_match_float64_in_bfloat16(gpu_pools, strategy, causal, text, backend):
    available(backend)
    gpu_pools(2).run("strategy", strategy, backend, causal, text)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend",
    ["VIDEO_SPARSE_ATTN", "SLA_ATTN", "BLOCK_SPARSE_ATTN", "VMOBA_ATTN", "SAGE_ATTN", "SAGE_SLA_ATTN"],
)
def test_sparse_backends_give_the_bits_of_one_process(gpu_pools, backend):
    available(backend)
    gpu_pools(2).run("sparse", backend)


@pytest.mark.gpu
def test_the_exchanges_run_over_nccl_with_one_rank_and_in_a_cuda_graph(gpu_pools):
    gpu_pools(1).run("one_rank")


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather_kv"])
def test_a_layer_over_two_gpus_runs_in_a_cuda_graph(gpu_pools, strategy):
    gpu_pools(2).run("captured", strategy)


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather_kv"])
def test_a_compiled_layer_over_two_gpus_matches(gpu_pools, strategy):
    gpu_pools(2).run("compiled", strategy)


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather_kv"])
def test_four_gpus_match_float64_in_bfloat16(gpu_pools, strategy):
    gpu_pools(4).run("strategy", strategy, "TORCH_SDPA", False, 5)
