"""Ranks that are started once per size and run one job after another."""

import datetime
import importlib
import os
import sys
import traceback

import torch
import torch.multiprocessing as mp


def _worker(rank, size, store, path, jobs, results):
    sys.path[:0] = path
    torch.set_num_threads(1)
    import torch.distributed as dist

    from attnmux.distributed import SPGroup

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=20)
    )
    sp = SPGroup.from_group(dist.group.WORLD, timeout=20)
    while (job := jobs.get()) is not None:
        module, name, arguments = job
        try:
            results.put((rank, getattr(importlib.import_module(module), name)(sp, *arguments), None))
        except BaseException:  # noqa: BLE001 - the test reports it
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    def __init__(self, size, directory):
        context = mp.get_context("spawn")
        self.size, self.results = size, context.Queue()
        self.jobs = [context.Queue() for _ in range(size)]
        path = [os.path.dirname(__file__)]
        self.processes = [
            context.Process(
                target=_worker,
                args=(rank, size, f"{directory}/store{size}", path, self.jobs[rank], self.results),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments, module="jobs"):
        """Run `function(sp, *arguments)` of a module beside this one on every rank; return the results in rank order."""
        for queue in self.jobs:
            queue.put((module, function, arguments))
        found = sorted((self.results.get(timeout=60) for _ in range(self.size)), key=lambda item: item[0])
        errors = [f"rank {rank}:\n{error}" for rank, _, error in found if error]
        assert not errors, "\n".join(errors)
        return [result for _, result, _ in found]

    def close(self):
        for queue in self.jobs:
            queue.put(None)
        for process in self.processes:
            process.join(20)
