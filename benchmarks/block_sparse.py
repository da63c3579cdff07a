"""The block-sparse operator next to its peers: one table, measured in one run.

    python benchmarks/block_sparse.py benchmarks/results/block_sparse.json
    python benchmarks/block_sparse.py out.json --device cpu --quick       (a dry run: the reference engine on tiny shapes)

Every number comes after a check against dense math in the same process. The most important cases come first, and the file is
written after each measurement, so a run that is cut short leaves what it has. A peer that is missing or raises is a row with
the reason. The environment variable COMMIT names the commit where there is no git.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time

import torch
from peers import BLOCK_SPARSE_PEERS, DENSE_PEERS

from attnmux.bench import (
    Case,
    Workload,
    describe_environment,
    make_clock,
    measure,
    measure_workload,
    refused_rows,
    write_rows,
)
from attnmux.errors import UnsupportedRequestError
from attnmux_blocksparse import block_sparse_attention
from attnmux_blocksparse.bench import (
    DENSE_LIST_CASES,
    KIND_CASES,
    MAIN_CASES,
    SHAPE_CASES,
    ListPattern,
    make_index,
)
from attnmux_blocksparse.ops import transpose

OURS = "BLOCK_SPARSE_ATTN"
DENSE = Case(name="dense", S_q=32768)
FLEX = ("FLEX_ATTENTION", "triton")
FLASH_DENSE = ("FLASH_ATTN_4", "cute")
FLASH_SPARSE = ("FLASH_ATTN_4", "cute, block-sparse")


def plan(engines):
    """What is measured, in order: (case, who); who is a backend and its engine."""
    ours = [(OURS, engine) for engine in engines]
    fast = ours[:1]
    peers = {"64x64": ("FASTVIDEO", "triton"), "128x64": ("SLA", "triton")}
    entries = []
    for case in MAIN_CASES:
        entries += [(case, who) for who in ours]
        if case.blocks in peers:
            entries.append((case, peers[case.blocks]))
    entries += [(case, who) for case in DENSE_LIST_CASES for who in ours]
    entries.append((DENSE, ("SDPA", "cudnn")))
    square = [case for case in MAIN_CASES if case.blocks == "128x128"]
    entries += [(case, FLEX) for case in square]
    entries += [(forward_only(case), FLASH_SPARSE) for case in square]
    entries += [(case, who) for case in KIND_CASES for who in fast]
    entries += [(case, who) for case in SHAPE_CASES for who in ours]
    entries += [(forward_only(DENSE), who) for who in (FLASH_DENSE, ("SAGEATTENTION", "triton"))]
    entries.append((DENSE, ("SDPA", "flash")))
    # they compile for long, so they come last; the engine runs the peer's kernels through our operator
    entries += [(case, (OURS, "fa4")) for case in square if "hopper" in engines]
    entries += [(backward_only(case), FLASH_SPARSE) for case in square]
    entries.append((backward_only(DENSE), FLASH_DENSE))
    return entries


def forward_only(case):
    return dataclasses.replace(case, directions=("forward",))


def backward_only(case):
    return dataclasses.replace(case, directions=("backward",))


@functools.lru_cache(maxsize=1)
def index_of(case, device):
    """The lists of a case, kept while its competitors take turns; the directions do not change them."""
    return make_index(case, device)


def our_workload(case, engine, device, clock):
    index = index_of(dataclasses.replace(case, directions=("forward", "backward")), device)
    lists_ms = measure(
        lambda: transpose(index.blocks, index.counts, index.num_key_blocks), clock, budget_s=0.02
    ).median_ms
    return Workload(
        case=case,
        backend=OURS,
        engine=engine,
        attend=lambda q, k, v: block_sparse_attention(q, k, v, index, engine=engine),
        pattern=ListPattern(index, case),
        # the backward pass reads the transposed lists, which are made once per index and not counted in its time
        extra={"transpose_ms": lists_ms},
    )


def make_workload(case, who, device, clock):
    if who[0] == OURS:
        return our_workload(case, who[1], device, clock)
    if who in DENSE_PEERS:
        return DENSE_PEERS[who](case)
    both = dataclasses.replace(case, directions=("forward", "backward"))
    return BLOCK_SPARSE_PEERS[who](case, index_of(both, device))


def measure_entry(case, who, device, clock, environment, budget_s):
    """The rows of one entry, and whether the device can still be used."""
    name, engine = who
    rows = []
    try:
        for row in measure_workload(
            make_workload(case, who, device, clock), clock, environment, device=device, budget_s=budget_s
        ):
            # one by one: a backward pass that raises leaves the forward's row
            rows.append(row)  # noqa: PERF402
    except Exception as error:  # noqa: BLE001 - whatever a competitor raises is its row, and the others go on
        is_answer = isinstance(error, (ImportError, UnsupportedRequestError))
        text = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        rows += refused_rows(
            case,
            environment,
            backend=name,
            engine=engine,
            is_peer=name != OURS,
            gate="not run" if is_answer else "failed",
            refused=text,
            done=tuple(row["direction"] for row in rows),
        )
        return rows, is_usable(device)
    return rows, True


def is_usable(device):
    """Whether the device still answers; after a fault in a kernel every further call fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def describe(row):
    if row["median_ms"] is None:
        return f"{row['direction']} {row['gate']}: {row['refused'][:300]}"
    worst = max(row["errors"].values())
    return f"{row['direction']} {row['median_ms']:.3f} ms {row['tflops']:.0f} TFLOP/s (error {worst:.1e})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few runs")
    parser.add_argument("--engines", default="", help="comma-separated; default: hopper,triton, reference on a CPU")
    parser.add_argument("--only", default="", help="only entries whose case, blocks, length or backend contain this")
    parser.add_argument("--limit", type=float, default=165.0, help="seconds after which no entry is begun")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    default = "hopper,triton" if device.type == "cuda" else "reference"
    engines = (arguments.engines or default).split(",")
    budget_s = 0.02 if arguments.quick else 0.25
    clock = make_clock(device)
    environment = describe_environment(device, commit=os.environ.get("COMMIT"))
    rows = []
    for case, who in plan(engines):
        entry = f"{case.name} {case.blocks} S={case.S_q} {' '.join(who).strip()}"
        if arguments.only not in entry:
            continue
        case = case.shrunk() if arguments.quick else case
        if device.type == "cpu":
            case = dataclasses.replace(case, dtype="float32")
        if time.monotonic() - started > arguments.limit:
            sys.stdout.write(
                f"{time.monotonic() - started:6.1f} s  {entry}: not begun, {arguments.limit:g} s are over\n"
            )
            continue
        found, can_go_on = measure_entry(case, who, device, clock, environment, budget_s)
        rows += found
        write_rows(arguments.output, rows)
        text = "; ".join(map(describe, found))
        sys.stdout.write(f"{time.monotonic() - started:6.1f} s  {entry}: {text}\n")
        sys.stdout.flush()
        if not can_go_on:
            sys.stdout.write("the device is unusable after a fault; the rest is not run\n")
            return 1
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
