"""Ranks that are started once per size and run one job after another, each within a time limit."""

import datetime
import faulthandler
import importlib
import queue
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp

RANK_TIMEOUT = 8.0
"""Seconds that a rank waits for another in a collective or a check."""
JOB_TIMEOUT = 40.0
"""Seconds after which a job counts as hung, start of the ranks included; twice as many on GPUs, for which more is compiled."""


def _worker(rank, size, store, jobs, results, module):
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    import torch.distributed as dist

    from attnmux.distributed import SPGroup

    limit = datetime.timedelta(seconds=RANK_TIMEOUT)
    backend, device = "gloo", None
    if module == "gpu_jobs":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        # NCCL has one rank per GPU; ranks that share one talk over gloo
        if size <= torch.cuda.device_count():
            backend, device = "nccl", torch.device("cuda", rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit, device_id=device
    )
    sp = SPGroup.from_group(dist.group.WORLD, timeout=RANK_TIMEOUT)
    while (job := jobs.get()) is not None:
        function, arguments = job
        # a rank that hangs says where, before the pool gives up on it
        faulthandler.dump_traceback_later(JOB_TIMEOUT * (2 if module == "gpu_jobs" else 1) - 2)
        try:
            home, _, name = function.rpartition(".")
            results.put((rank, getattr(importlib.import_module(home or module), name)(sp, *arguments), None))
        except BaseException:  # noqa: BLE001 - the test reports it
            results.put((rank, None, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


class Pool:
    """`size` processes in one group; once a job has failed the ranks may be out of step, and the pool is closed.

    The jobs are functions of `module`: "jobs" on the CPU, "gpu_jobs" on GPUs, which ranks share if there are too few.
    """

    def __init__(self, size, directory, module="jobs"):
        context = mp.get_context("spawn")
        self.size, self.is_open, self.results = size, True, context.Queue()
        self.limit = JOB_TIMEOUT * (2 if module == "gpu_jobs" else 1)
        self.jobs = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(
                target=_worker,
                args=(rank, size, f"{directory}/store", self.jobs[rank], self.results, module),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments, dies=None):
        """Run `function(sp, *arguments)` of the module on every rank; return the results in rank order.

        With `dies` that rank is not waited for: it ends its process, and the pool is closed afterwards.
        """
        expected = [rank for rank in range(self.size) if rank != dies]
        for jobs in self.jobs:
            jobs.put((function, arguments))
        found, deadline = {}, time.monotonic() + self.limit
        while len(found) < len(expected):
            try:
                rank, result, error = self.results.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                silent = sorted(set(expected) - set(found))
                self.close(kill=True)
                errors = "".join(f"\nrank {rank}:\n{error}" for rank, (_, error) in sorted(found.items()) if error)
                raise AssertionError(
                    f"{function}{arguments}: no answer from ranks {silent} of {self.size} within {self.limit:g} s{errors}"
                ) from None
            found[rank] = result, error
        errors = "".join(f"\nrank {rank}:\n{error}" for rank, (_, error) in sorted(found.items()) if error)
        if errors:
            self.close(kill=True)
            raise AssertionError(f"{function}{arguments} on {self.size} ranks:{errors}")
        if dies is not None:
            self.close(kill=True)
        return [found[rank][0] for rank in expected]

    def close(self, *, kill=False):
        if not self.is_open:
            return
        self.is_open = False
        for jobs, process in zip(self.jobs, self.processes, strict=True):
            if kill:
                process.kill()
            else:
                jobs.put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
