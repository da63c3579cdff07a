"""Quantised attention, dense and as the sparse branch of SLA, quantisation included, next to its peers.

    python benchmarks/sage.py benchmarks/results/sage.json
    python benchmarks/sage.py out.json --device cpu --quick     (a dry run: the reference engine on tiny shapes)

Every number comes after a check of sampled rows against dense float32 math over the same keys in the same process. "CUDA graph" is
the device's time without the host's launches; its output is compared bit by bit with that of the call. Peers: cuDNN through
torch, sageattention 1.0.6 from the package index, and SLA_ATTN, the same layer in bfloat16. The file is written after each
measurement. The environment variable COMMIT names the commit where there is no git.
"""

import argparse
import dataclasses
import os
import sys
import time

import torch
from peers import DENSE_PEERS

from attnmux.bench import (
    DensePattern,
    Workload,
    describe_environment,
    make_clock,
    measure,
    measure_workload,
    refused_rows,
    write_rows,
)
from attnmux.bench.record import make_row
from attnmux_sage import SageSLAAttentionImpl, sage_attention
from attnmux_sage.bench import CASES, LIMIT, prepare
from attnmux_sla import SLAAttentionImpl


def captured(run, *inputs):
    """The replay of a CUDA graph of a call on these inputs, after a check that it gives the bits of the call."""
    expected = run(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*inputs)
    graph.replay()
    if not torch.equal(out, expected):
        raise RuntimeError("the graph's output is not that of the call it was captured from")
    return graph.replay


def dense_runs(case, device):
    """What is measured of SAGE_ATTN: (engine, workload)."""
    for pv in ("fp8", "bf16"):
        yield Workload(
            case=case, backend="SAGE_ATTN", engine=f"{pv} values", pattern=DensePattern(case), limit=LIMIT,
            attend=lambda q, k, v, pv=pv: sage_attention(q, k, v, pv=pv, causal=case.causal),
        )  # fmt: skip


def sla_runs(case, device):
    """The layers, their projections still zero: what it costs is the same, and the pattern says all."""
    prepared = prepare("SAGE_SLA_ATTN", case, device)
    shared = {"topk_ratio": case.keep, "use_bf16": case.dtype != "float16"}
    layers = (
        ("SAGE_SLA_ATTN", "fp8 values", LIMIT, SageSLAAttentionImpl(case.H, case.D, pv="fp8", **shared)),
        ("SAGE_SLA_ATTN", "bf16 values", LIMIT, SageSLAAttentionImpl(case.H, case.D, pv="bf16", **shared)),
        ("SLA_ATTN", "module", None, SLAAttentionImpl(case.H, case.D, **shared)),
    )
    for backend, engine, limit, layer in layers:
        yield Workload(
            case=case, backend=backend, engine=engine, attend=layer.to(device), pattern=prepared.pattern, limit=limit
        )


class Run:
    """One run of the benchmark: clock, rows so far, and the file that they are written to after each number."""

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
        self.say(f"  {row['backend']} {row['engine']}: {number}")

    def measure(self, case, make, backend, engine, is_peer=False):
        """Add the row of a workload; an error is the row of what raised it, and the others go on."""
        try:
            workload = make()
            for row in measure_workload(
                workload, self.clock, self.environment, device=self.device, budget_s=self.budget_s
            ):
                self.add(row)
                if self.device.type == "cuda" and not is_peer and row["gate"] == "green":
                    self.add(self.graph_row(workload, row))
        except Exception as error:  # noqa: BLE001 - whatever a competitor raises is its row
            text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            for row in refused_rows(
                case, self.environment, backend=backend, engine=engine, is_peer=is_peer, refused=text
            ):
                self.add(row)

    def graph_row(self, workload, row):
        """The same call as a CUDA graph, under the gate that the call has passed."""
        case = workload.case
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = getattr(torch, case.dtype)
        inputs = [
            torch.randn(case.B, length, heads, case.D, generator=generator, device=self.device, dtype=dtype)
            for length, heads in ((case.S_q, case.H), (case.S_k, case.H_kv), (case.S_k, case.H_kv))
        ]
        with torch.no_grad():
            timing = measure(captured(workload.attend, *inputs), self.clock, budget_s=self.budget_s)
        return make_row(
            case, "forward", self.environment, backend=workload.backend, engine=f"{workload.engine}, CUDA graph",
            gate="green", errors=row["errors"], timing=timing, pairs=workload.pattern.pairs(),
        )  # fmt: skip

    def measure_quantisation(self, case):
        """The pre-pass alone; the rows of the whole call hold its check."""
        if self.device.type != "cuda":
            return
        from attnmux_sage.kernels.quantise import launch_quantise

        generator = torch.Generator(self.device).manual_seed(0)
        shape, dtype = (case.B, case.S_q, case.H, case.D), getattr(torch, case.dtype)
        q, k, v = (torch.randn(shape, generator=generator, device=self.device, dtype=dtype) for _ in range(3))
        for pv in ("fp8", "bf16"):
            timing = measure(
                lambda pv=pv: launch_quantise(q, k, v, softmax_scale=case.D**-0.5, fp8_values=pv == "fp8"),
                self.clock, budget_s=self.budget_s,
            )  # fmt: skip
            self.add(
                make_row(
                    case, "forward", self.environment, backend="SAGE_ATTN", engine=f"{pv} values, quantisation alone",
                    gate="green", timing=timing,
                )
            )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few runs")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds for the timed runs of one number")
    parser.add_argument("--limit", type=float, default=165.0, help="seconds after which nothing is begun")
    arguments = parser.parse_args()
    run = Run(arguments)

    def prepared(case):
        case = case.shrunk() if arguments.quick else case
        return dataclasses.replace(case, dtype="float32") if run.device.type == "cpu" else case

    steps = []
    for case in map(prepared, CASES["SAGE_ATTN"]):
        steps.append(("dense", case, dense_runs))
        steps.append(("peers", dataclasses.replace(case, directions=("forward",)), None))
    steps += [("layer", case, sla_runs) for case in map(prepared, CASES["SAGE_SLA_ATTN"])]
    for name, case, make in steps:
        if run.seconds() > arguments.limit:
            run.say(f"{name}, {case.name} S={case.S_q}: not begun, {arguments.limit:g} s are over")
            continue
        run.say(f"{name}, {case.name} S={case.S_q}")
        if make is None:
            for key in (("SDPA", "cudnn"), ("SAGEATTENTION", "triton")):
                run.measure(case, lambda key=key, case=case: DENSE_PEERS[key](case), *key, is_peer=True)
            continue
        for workload in make(case, run.device):
            run.measure(case, lambda workload=workload: workload, workload.backend, workload.engine)
        if name == "dense":
            run.measure_quantisation(case)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
