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
import functools
import sys

import torch
from peers import DENSE_PEERS
from run import Run, captured

from attnmux.bench import DensePattern, Workload, draw_inputs, measure
from attnmux.bench.record import make_row
from attnmux_sage import SageSLAAttentionImpl, sage_attention
from attnmux_sage.bench import CASES, LIMIT, prepare
from attnmux_sla import SLAAttentionImpl


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


class SageRun(Run):
    """A run of this benchmark."""

    def measure_ours(self, workload):
        """Add the row of a workload, and that of its CUDA graph."""
        who = {"backend": workload.backend, "is_peer": False}
        added = self.add_workload(workload.case, lambda: workload, engine=workload.engine, **who)
        for row in added:
            if self.device.type == "cuda" and row["gate"] == "green":
                engine = f"{workload.engine}, CUDA graph"
                self.add_or_refuse(workload.case, lambda row=row: [self.graph_row(workload, row)], engine=engine, **who)

    def graph_row(self, workload, row):
        """The same call as a CUDA graph, under the gate that the call has passed."""
        case = workload.case
        inputs = draw_inputs(case, self.device)
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

        q, k, v = draw_inputs(case, self.device)
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
    run = SageRun(arguments)

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
            for backend, engine in (("SDPA", "cudnn"), ("SAGEATTENTION", "triton")):
                make_peer = functools.partial(DENSE_PEERS[backend, engine], case)
                run.add_workload(case, make_peer, backend=backend, engine=engine, is_peer=True)
            continue
        for workload in make(case, run.device):
            run.measure_ours(workload)
        if name == "dense":
            run.measure_quantisation(case)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
