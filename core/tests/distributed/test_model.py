"""Layers over several ranks within a model: compiled, under autocast, checkpointed, with FSDP2; and what they copy."""

import pytest

STRATEGIES = [(2, "ulysses"), (2, "ring"), (2, "allgather_kv"), (4, "usp")]
# with the exchange in groups of heads too
OVERLAPS = [(2, "ulysses", 2), *((*pair, 1) for pair in STRATEGIES)]


@pytest.mark.parametrize(("size", "strategy", "overlap"), OVERLAPS)
def test_compiles_without_graph_breaks_and_twice_for_any_number_of_lengths(pools, size, strategy, overlap):
    for counts in pools(size).run("model_jobs.compiled", strategy, strategy in ("ulysses", "ring"), overlap):
        # with sizes as numbers, and at the second length with sizes as variables
        assert counts[0] == 1
        assert counts[1] == counts[-1] <= 2


def test_compiled_exchanges_are_under_way_while_attention_runs_and_nothing_is_sent_twice(pools):
    # three heads are two groups on one rank, and a group and nothing on the other
    for rank, logs in enumerate(pools(2).run("model_jobs.compiled_order", "ulysses", 3, 2)):
        first, second = ["wait", "attend", "send back"], ["wait", *["attend"] * (not rank), "send back"]
        assert logs[0] == ["send", "send", *first, *second, "wait back"]
        # the last group comes first
        assert logs[1] == ["send", "send", *second, *first, "wait back"]
    forward = ["send", "attend", "wait", "attend"]
    for logs in pools(2).run("model_jobs.compiled_order", "ring", 4, 1):
        # gradients of keys go home
        assert logs == [forward, [*forward, "send", "wait"]]


@pytest.mark.parametrize(("size", "strategy", "overlap"), OVERLAPS)
def test_checkpointing_gives_the_same_gradients(pools, size, strategy, overlap):
    pools(size).run("model_jobs.checkpointed", strategy, overlap)


@pytest.mark.parametrize(("size", "strategy"), STRATEGIES)
def test_bfloat16_and_autocast_give_what_local_attention_does(pools, size, strategy):
    # parts are merged in the dtype that came in; the others hand it to torch, which rounds it as it does for LocalAttention
    kept = "torch.float32" if strategy in ("ring", "usp") else "torch.bfloat16"
    assert pools(size).run("model_jobs.autocast", strategy) == [kept] * size


@pytest.mark.parametrize(
    ("size", "strategy", "backend", "overlap"),
    [
        (2, "ulysses", "SLA_ATTN", 2),
        (4, "ulysses", "SLA_ATTN", 1),
        (4, "ring", "TORCH_SDPA", 1),
        (2, "allgather_kv", "TORCH_SDPA", 1),
    ],
)
def test_gradients_are_right_with_fsdp_on_the_mesh_of_the_sequence(pools, size, strategy, backend, overlap):
    if backend == "SLA_ATTN":
        pytest.importorskip("attnmux_sla")
    pools(size).run("model_jobs.fully_sharded", strategy, backend, overlap)


@pytest.mark.parametrize("overlap", [1, 2])
def test_the_exchanges_copy_eight_elements_per_element_of_a_local_tensor(pools, overlap):
    # read and written: q, k, v into one buffer, the output out of one; 16 bytes in half precision. Backward joins three gradients
    # for the way there, and takes them apart
    for found in pools(2).run("model_jobs.copied_elements", overlap):
        assert found == (8.0, 0, 14.0, 0)
