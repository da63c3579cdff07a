"""One rank's share of the work of several, on one GPU: what would come from other ranks is filled in from memory."""

import time
from unittest.mock import patch

import torch

from attnmux.distributed import exchange_ops, ring
from attnmux.distributed.collective import Pending
from attnmux.distributed.direct import others


class Finished:
    def wait(self):
        """Nothing is under way."""


class LeftOut:
    """Transfers that are left out inside the block: what would come is filled in from memory, and the time of that is known."""

    def __init__(self, device):
        self.device, self.prepared, self.intervals = device, {}, []

    def exchange(self, received, elements, write, *_, takes_own=True, **__):
        """Write what others would copy, and this rank's own part, as an exchange does among ranks that see each other's memory."""
        rank, outgoing = elements.rank, elements.outgoing
        starts, stage = elements.staged(rank), received.new_empty(sum(outgoing))
        for ranks in others(rank, len(outgoing)):
            write(ranks, stage[starts[ranks.start] : starts[ranks.stop]])
        self.fill(received)
        if takes_own:
            write(range(rank, rank + 1), torch.split(received, elements.incoming)[rank])

    def fill(self, received, *_, **__):
        if received.numel() not in self.prepared:
            # numbers like those that would come: what sparse backends choose depends on them
            self.prepared[received.numel()] = torch.randn_like(received)
        source = self.prepared[received.numel()]
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            received.copy_(source)
            end.record()
            self.intervals.append((start, end))
        else:
            started = time.perf_counter()
            received.copy_(source)
            self.intervals.append(time.perf_counter() - started)
        return Pending(received, Finished(), "")

    def measure(self, measure, runs):
        """Return what `measure` does, and the milliseconds that one of its `runs` spent with filling in."""
        self.intervals.clear()
        with (
            patch.object(exchange_ops, "exchange", self.exchange),
            patch.object(ring, "start_all_to_all", self.fill),
        ):
            found = measure()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return found, sum(start.elapsed_time(end) for start, end in self.intervals) / runs
        return found, 1e3 * sum(self.intervals) / runs
