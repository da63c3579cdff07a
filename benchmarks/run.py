"""What the benchmarks of whole methods share: a run that writes each number as it comes, and times of the device alone."""

import os
import sys
import time

import torch

from attnmux.bench import describe_environment, make_clock, measure_workload, refused_rows, write_rows


def captured(run, *inputs):
    """The replay of a CUDA graph of a call on these inputs: its time without that of the host's launches.

    Its output is compared bit by bit with that of the call.
    """
    expected = run(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*inputs)
    graph.replay()
    if not torch.equal(out, expected):
        raise RuntimeError("the graph's output is not that of the call it was captured from")
    return graph.replay


class Run:
    """One run of a benchmark: clock, rows so far, and the file that they are written to after each number.

    Its arguments are those of the command line: output, device, budget, quick.
    """

    def __init__(self, arguments):
        device = torch.device(arguments.device)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        self.device, self.output = device, arguments.output
        self.budget_s = 0.02 if arguments.quick else arguments.budget
        self.clock, self.environment = make_clock(device), describe_environment(device, commit=os.environ.get("COMMIT"))
        self.rows, self.started = [], time.monotonic()

    def seconds(self):
        return time.monotonic() - self.started

    def say(self, text):
        sys.stdout.write(f"{self.seconds():6.1f} s  {text}\n")
        sys.stdout.flush()

    def add(self, row):
        self.rows.append(row)
        write_rows(self.output, self.rows)
        number = f"{row['median_ms']:.4f} ms" if row["median_ms"] else row.get("refused")
        self.say(f"  {row['backend']} {row['engine']}, {row['direction']}: {number}")

    def add_or_refuse(self, case, rows, *, backend, engine, is_peer):
        """Add rows as they come and return them; an error is the row of what raised it, and the others go on."""
        added = []
        try:
            for row in rows():
                self.add(row)
                added.append(row)
        except Exception as error:  # noqa: BLE001 - whatever a competitor raises is its row
            text = " ".join(f"{type(error).__name__}: {error}".split())[:600]
            done = tuple(row["direction"] for row in added)
            for row in refused_rows(
                case, self.environment, backend=backend, engine=engine, is_peer=is_peer, refused=text, done=done
            ):
                self.add(row)
        return added

    def add_workload(self, case, make, *, backend, engine, is_peer):
        """Add the rows of a workload, made by a function that may raise too."""

        def rows():
            yield from measure_workload(
                make(), self.clock, self.environment, device=self.device, budget_s=self.budget_s
            )

        return self.add_or_refuse(case, rows, backend=backend, engine=engine, is_peer=is_peer)
