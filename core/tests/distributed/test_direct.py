"""Exchanges by copies from memory that all ranks see, on the CPU, where mapped files stand in for it; see test_distributed too."""

import pytest
from test_distributed import order_of

from attnmux.distributed.direct import Elements


@pytest.mark.parametrize(("size", "overlap"), [(2, 2), (2, 3), (4, 2)])
def test_groups_of_heads_give_the_same_bits(pools, size, overlap):
    for shape in ((7, 2, 12, 6, 1, True, True), (2, 1, 7, 7, 1, True, True)):
        pools(size).run("direct_jobs.run", "overlap_jobs.overlapped", shape, overlap)


@pytest.mark.parametrize("overlap", [1, 2])
def test_groups_leave_and_arrive_in_the_same_order(pools, overlap):
    assert pools(2).run("direct_jobs.run", "overlap_jobs.order", overlap) == [order_of(overlap)] * 2


@pytest.mark.parametrize("trains", [False, True])
def test_compiled_code_gives_the_same(pools, trains):
    pools(2).run("direct_jobs.run", "model_jobs.compiled", "ulysses", trains, 2)


def test_checkpointing_gives_the_same_gradients(pools):
    pools(2).run("direct_jobs.run", "model_jobs.checkpointed", "ulysses", 2)


def test_stages_are_used_again_and_grow(pools):
    for sizes, grown, count in pools(2).run("direct_jobs.stages"):
        # of a rank's 4 tokens, 2 of 4 heads of q, k and v
        assert sizes == [4 * 3 * 2 * 8 * 8]
        assert grown == [8 * 3 * 2 * 8 * 8]
        assert count == 2


def test_training_follows_inference(pools):
    pools(2).run("direct_jobs.inference_first")


@pytest.mark.parametrize("job", ["elsewhere", "off"])
def test_collectives_remain_where_ranks_do_not_see_each_other(pools, job):
    pools(2).run(f"direct_jobs.{job}")


def test_a_rank_without_memory_is_named_once(pools):
    for message in pools(2).run("direct_jobs.one_without"):
        assert message.startswith("collectives exchange instead: group ")
        assert (
            "rank 1 got no 2097152 bytes that other ranks see: no peer access; a group made with direct=False"
            in message
        )


def test_a_stage_that_cannot_grow_is_an_error(pools):
    for rank, message in enumerate(pools(2).run("direct_jobs.too_large")):
        assert f"rank {rank} got no 1536 bytes that other ranks see: out of memory" in message
        assert "direct=False" in message
    for message in pools(2).run("direct_jobs.not_in_a_graph"):
        assert "captures a CUDA graph that exchanges 2097153 bytes, for which there is no stage yet; run" in message


def test_what_is_for_a_rank_lies_in_every_stage_where_it_is_looked_for():
    elements = Elements([3, 1, 2], [5, 7, 11], 1)
    assert elements.incoming == [21, 7, 14]
    assert elements.outgoing == [5, 7, 11]
    assert elements.staged(0) == [0, 0, 21, 54]
    assert elements.staged(1) == [0, 5, 5, 16]
    assert elements.staged(2) == [0, 10, 24, 24]
    assert elements.largest_stage == 54
