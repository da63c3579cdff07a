"""Ranks that disagree, or do not come: every one ends in time, before wrong data can be read, and says why."""

import os
import re
import socket
import subprocess
import sys

import pytest

FIELDS = {
    "dtype": "dtype",
    "rows": "lengths",
    "softmax_scale": "softmax_scale",
    "text": "text",
    "backend": "backend",
    "overlap": "overlap",
    "version": "attnmux",
    # the ranks are about to run different collectives
    "strategy": "operation",
}
# on top of the timeout of the group
GRACE = 5.0


@pytest.mark.parametrize(("size", "field"), [*((2, field) for field in FIELDS), (4, "rows"), (4, "strategy")])
def test_disagreement_names_the_rank_and_the_field_before_data_moves(pools, size, field):
    for rank, (message, seconds) in enumerate(pools(size).run("disagree", field)):
        odd = size - 1
        operation = "ring" if field == "strategy" and rank == odd else "to_heads"
        assert f"agreement before {operation}: ranks differ in {FIELDS[field]}: rank {rank} has" in message
        assert f"rank {0 if rank == odd else odd} has" in message
        assert seconds < 5.0 + GRACE


def test_the_variable_makes_ranks_compare_calls_they_have_agreed_on_before(pools):
    for rank, (message, _) in enumerate(pools(2).run("disagree_later", True)):
        assert f"ranks differ in lengths: rank {rank} has" in message


def test_without_the_variable_a_later_disagreement_ends_every_rank_in_time(pools):
    (first, seconds), (second, more_seconds) = pools(2).run("disagree_later", False)
    assert "to_heads failed on rank 0 of 2" in first
    assert "before to_heads: rank 1 waited 1.5 s for rank 0, which did not come" in second
    assert max(seconds, more_seconds) < 1.5 + GRACE


def test_a_missing_rank_is_named_in_time(pools):
    message, seconds = pools(2).run("missing")[0]
    assert "before to_heads: rank 0 waited 1 s for rank 1, which did not come" in message
    assert seconds < 1.0 + GRACE


def test_a_rank_that_misses_the_backward_pass_is_named_in_time(pools):
    message, seconds = pools(2).run("missing_in_backward")[0]
    assert "before to_shards backward: rank 0 waited 1 s for rank 1, which did not come" in message
    assert seconds < 1.0 + GRACE


@pytest.mark.parametrize(
    ("size", "strategy", "backward", "overlap", "operation"),
    [
        (4, "ulysses", True, 1, "to_shards backward"),
        (2, "ulysses", False, 2, "to_heads"),
        (2, "ulysses", True, 2, "to_shards backward"),
        (2, "ring", False, 1, "ring"),
        (2, "allgather_kv", True, 1, "gather backward"),
    ],
)
def test_a_rank_that_dies_in_a_collective_ends_the_others_in_time(pools, size, strategy, backward, overlap, operation):
    found = pools(size).run("dies", strategy, backward, overlap, dies=size - 1)
    assert len(found) == size - 1
    what = "receiving" if overlap > 1 else "sending"
    for rank, (message, seconds) in enumerate(found):
        assert re.match(rf"group '\w+': {operation} failed on rank {rank} of {size}, {what} ", message)
        assert seconds < 3.0 + GRACE


def test_a_job_that_hangs_fails_with_a_message(tmp_path, monkeypatch):
    import pool

    monkeypatch.setattr(pool, "JOB_TIMEOUT", 1.0)
    with pytest.raises(AssertionError, match=r"hang\(\): no answer from ranks \[0\] of 1 within 1 s"):
        pool.Pool(1, tmp_path).run("hang")


def test_a_group_of_a_name_that_was_used_before_agrees_anew(tmp_path):
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    from attnmux.distributed.agreement import agree

    for place in ("first", "second"):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/{place}", rank=0, world_size=1)
        try:
            group = c10d._resolve_process_group(dist.group.WORLD.group_name)
            store = c10d._world.pg_map[group][1]
            agree(group, "operation=test", 1.0, every_call=False)
            assert store.check(["attnmux/0/0"])
            agree(group, "operation=other", 1.0, every_call=False)
            assert store.check(["attnmux/1/0"])
        finally:
            dist.destroy_process_group()
            del group, store


AT_EXIT = """
import atexit
import torch.distributed as dist
from attnmux import init_sequence_parallel

# registered first, so run last
atexit.register(lambda: print("initialised" if dist.is_initialized() else "destroyed"))
init_sequence_parallel(backend="gloo", timeout=5.0)
"""


@pytest.mark.parametrize(
    ("ending", "found"), [("", "destroyed"), ("raise SystemExit(3)", "destroyed"), ("1 / 0", "initialised")]
)
def test_what_was_initialised_is_destroyed_at_exit_unless_an_error_ends_the_program(ending, found):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", AT_EXIT + ending]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    # torch 2.10 talks about its connections before
    assert done.stdout.split()[-1:] == [found], done.stderr
