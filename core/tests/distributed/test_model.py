"""Layers over several ranks within a model: compiled, under autocast, checkpointed, with FSDP2; and what they copy."""

import pytest

STRATEGIES = [(2, "ulysses"), (2, "ring"), (2, "allgather_kv"), (4, "usp")]


@pytest.mark.parametrize(("size", "strategy"), STRATEGIES)
def test_compiles_without_graph_breaks_and_twice_for_any_number_of_lengths(pools, size, strategy):
    for counts in pools(size).run("model_jobs.compiled", strategy, strategy in ("ulysses", "ring")):
        # with sizes as numbers, and at the second length with sizes as variables
        assert counts[0] == 1
        assert counts[1] == counts[-1] <= 2


@pytest.mark.parametrize(("size", "strategy"), STRATEGIES)
def test_checkpointing_gives_the_same_gradients(pools, size, strategy):
    pools(size).run("model_jobs.checkpointed", strategy)


@pytest.mark.parametrize(("size", "strategy"), STRATEGIES)
def test_bfloat16_and_autocast_give_what_local_attention_does(pools, size, strategy):
    # parts are merged in the dtype that came in; the others hand it to torch, which rounds it as it does for LocalAttention
    kept = "torch.float32" if strategy in ("ring", "usp") else "torch.bfloat16"
    assert pools(size).run("model_jobs.autocast", strategy) == [kept] * size


@pytest.mark.parametrize(
    ("size", "strategy", "backend"),
    [
        (2, "ulysses", "SLA_ATTN"),
        (4, "ulysses", "SLA_ATTN"),
        (4, "ring", "TORCH_SDPA"),
        (2, "allgather_kv", "TORCH_SDPA"),
    ],
)
def test_gradients_are_right_with_fsdp_on_the_mesh_of_the_sequence(pools, size, strategy, backend):
    if backend == "SLA_ATTN":
        pytest.importorskip("attnmux_sla")
    pools(size).run("model_jobs.fully_sharded", strategy, backend)


def test_the_exchanges_copy_eight_elements_per_element_of_a_local_tensor(pools):
    # read and written: q, k, v into one buffer, the output out of one; 16 bytes in half precision. Backward joins three gradients
    # into the buffer that is sent
    for found in pools(2).run("model_jobs.copied_elements"):
        assert found == (8.0, 0, 8.0, 1)
