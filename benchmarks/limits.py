"""How close kernels come to the card's own limits: the clock that it holds under load, and the last wave of tiles.

    python benchmarks/limits.py benchmarks/results/limits.json

Each kernel runs cool (a few launches after a pause) and held (back to back for a second). A small kernel before and after
reads every multiprocessor's cycle counter and the wall clock, which gives the clock that was really held; the share of the
tensor cores' peak is counted at that clock: 4,096 bf16 operations per multiprocessor and cycle on Hopper. Block-sparse
kernels run at 33,792 tokens too, where the tiles of 12 heads fill 132 multiprocessors 24 times without a rest.
Correctness is checked by benchmarks/block_sparse.py, which runs the same kernels on the same lists.
"""

import argparse
import dataclasses
import os
import sys
import time

import torch
import triton
import triton.language as tl
from peers import BLOCK_SPARSE_PEERS, DENSE_PEERS

from attnmux.bench import Case, describe_environment, write_rows
from attnmux_blocksparse import block_sparse_attention
from attnmux_blocksparse.bench import DENSE_LIST_CASES, MAIN_CASES, make_index

OPERATIONS_PER_CYCLE = 4096
COOL_LAUNCHES = 5
PAUSE_S = 0.4
WHOLE_WAVES = 33792


@triton.jit
def _read_clocks_kernel(out_ptr):
    """Cycle counter and nanoseconds of the multiprocessor that a program runs on; any of its programs may write last."""
    place = tl.extra.cuda.smid()
    cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    nanoseconds = tl.extra.cuda.globaltimer()
    tl.store(out_ptr + place * 2, cycles)
    tl.store(out_ptr + place * 2 + 1, nanoseconds)


def read_clocks(multiprocessors):
    """int64 [multiprocessors, 2]: cycles and nanoseconds, launched on the current stream."""
    out = torch.zeros(multiprocessors, 2, dtype=torch.int64, device="cuda")
    _read_clocks_kernel[(multiprocessors * 16,)](out, num_warps=1)
    return out


def run_for(run, launches, multiprocessors):
    """Milliseconds per launch, and the clock in MHz, over so many launches back to back."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before = read_clocks(multiprocessors)
    start.record()
    for _ in range(launches):
        run()
    end.record()
    after = read_clocks(multiprocessors)
    torch.cuda.synchronize()
    # a multiprocessor whose programs wrote in neither reading has no difference
    seen = (before[:, 1] > 0) & (after[:, 1] > 0)
    spent = (after - before)[seen].double()
    return start.elapsed_time(end) / launches, float((spent[:, 0] / spent[:, 1]).median()) * 1000


def matmul_case(length):
    a, b = (torch.randn(length, length, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b, 2 * length**3


def attention_case(case, attend, direction):
    """A launch and its operations; the backward pass alone where that is asked for."""
    q, k, v = (
        torch.randn(1, case.S_q, case.H, case.D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    kept = 1.0 if case.blocks == "" else max(1, round(case.keep * (case.S_k // case.block_k))) * case.block_k / case.S_k
    operations = 4 * case.H * case.S_q * case.S_k * case.D * kept
    if direction == "forward":

        def forward():
            with torch.no_grad():
                attend(q, k, v)

        return forward, operations
    out = attend(q, k, v)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), 2.5 * operations


def ours(case, engine):
    index = make_index(case, torch.device("cuda"))
    return lambda q, k, v: block_sparse_attention(q, k, v, index, engine=engine)


def plan():
    """What is measured: (name, engine, case or None, direction, maker)."""
    dense = Case(name="dense", S_q=32768)
    square, wide = (next(c for c in MAIN_CASES if c.blocks == blocks) for blocks in ("128x128", "128x64"))
    yield "matmul 8192", "cublas", None, "forward", lambda: matmul_case(8192)
    for case in (square, wide):
        for length in (32768, WHOLE_WAVES, 76800):
            sized = dataclasses.replace(case, S_q=length, S_k=length)
            for direction in ("forward", "backward") if length == 32768 else ("forward",):
                yield (
                    f"block-sparse {case.blocks}", "hopper", sized, direction,
                    lambda c=sized, d=direction: attention_case(c, ours(c, "hopper"), d),
                )  # fmt: skip
    flash_dense = DENSE_PEERS["FLASH_ATTN_4", "cute"]
    flash_sparse = BLOCK_SPARSE_PEERS["FLASH_ATTN_4", "cute, block-sparse"]
    for length in (32768, WHOLE_WAVES):
        sized = dataclasses.replace(square, S_q=length, S_k=length, directions=("forward",))
        yield (
            "block-sparse 128x128", "flash-attn 4", sized, "forward",
            lambda c=sized: attention_case(c, flash_sparse(c, make_index(c, torch.device("cuda"))).attend, "forward"),
        )  # fmt: skip
    lists = DENSE_LIST_CASES[0]
    for direction in ("forward", "backward"):
        yield (
            "all lists full",
            "hopper",
            lists,
            direction,
            lambda d=direction: attention_case(lists, ours(lists, "hopper"), d),
        )
        yield (
            "dense",
            "flash-attn 4",
            dense,
            direction,
            lambda d=direction: attention_case(dense, flash_dense(dense).attend, d),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which nothing is begun")
    parser.add_argument("--held", type=float, default=1.0, help="seconds of back-to-back launches")
    arguments = parser.parse_args()
    started = time.monotonic()
    environment = describe_environment(torch.device("cuda"), commit=os.environ.get("COMMIT"))
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for name, engine, case, direction, make in plan():
        if time.monotonic() - started > arguments.limit:
            sys.stdout.write(f"{name} {engine} {direction}: not begun\n")
            continue
        row = {
            "case": name,
            "engine": engine,
            "S": case.S_q if case else None,
            "direction": direction,
            **dataclasses.asdict(environment),
        }
        try:
            run, operations = make()
            run_for(run, 3, multiprocessors)
            once, _ = run_for(run, 3, multiprocessors)
            for state, launches in (("cool", COOL_LAUNCHES), ("held", max(3, int(arguments.held * 1000 / once)))):
                torch.cuda.synchronize()
                time.sleep(PAUSE_S)
                milliseconds, mhz = run_for(run, launches, multiprocessors)
                rate = operations / milliseconds / 1e9
                peak = multiprocessors * OPERATIONS_PER_CYCLE * mhz * 1e-6
                row[state] = {"ms": milliseconds, "tflops": rate, "clock_mhz": mhz, "share_of_peak": rate / peak}
        except Exception as error:  # noqa: BLE001 - a competitor that raises is its row, and the others go on
            row["refused"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        rows.append(row)
        write_rows(arguments.output, rows)
        text = "; ".join(
            f"{s} {row[s]['ms']:.3f} ms {row[s]['tflops']:.0f} TF/s {row[s]['clock_mhz']:.0f} MHz {row[s]['share_of_peak']:.1%}"
            for s in ("cool", "held")
            if s in row
        )
        sys.stdout.write(f"{name} {engine} S={row['S']} {direction}: {text or row['refused']}\n")
        sys.stdout.flush()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
