"""VMOBA_ATTN next to dense attention: times and peak memory of top-k and of thresholds, on three kinds of inputs.

    python benchmarks/vmoba.py benchmarks/results/vmoba.json
    python benchmarks/vmoba.py out.json --device cpu --quick       (a dry run: the reference on a tiny video)

Random: unit normals. Smooth: a field that varies slowly over the video, and noise. Agreeing: 128 queries that follow one another in
the order of the chunks are the same but for noise, and choose nearly the same chunks. `union_ratio` says how nearly: the chunks
that one of such 128 chose, by those that each of them chose.

Every number comes after a check of sampled rows and keys in the same process. Times are of whole calls: the choice, the
reordering and the attention. `host_ms` is what a call takes the host until it returns; `peak_mib` counts q, k, v, dout and all
that a call allocates. The released VMoBA is a row with a reason where its packages are missing.
"""

import argparse
import dataclasses
import math
import os
import sys
import time

import torch
from peers.sdpa import sdpa_cudnn, sdpa_flash
from torch.nn import functional as F

from attnmux.bench import Case, check_samples, describe_environment, make_clock, measure, refused_rows, write_rows
from attnmux.bench.record import make_row
from attnmux_vmoba.bench import GRID, LAYERS, THRESHOLD, ChosenPattern
from attnmux_vmoba.ops import attend_chunks, select_bits
from attnmux_vmoba.prepare import Selection, from_chunk_order, resolve_chunks, unpack_bits

QUICK_GRID = (5, 8, 8)
# chunk size of a full run, of a quick run
CHUNK_SIZES = {"temporal": (4, 1), "spatial": ((12, 8), (4, 4)), "spatio_temporal": ((4, 12, 8), (1, 4, 4))}

BY_THRESHOLD = Selection("threshold", threshold=THRESHOLD)
# queries that are walked or sorted together
RANGE = 128
AGREEING_NOISE = 0.01
# what is measured, the most important first: inputs, kind of chunk, choice
ENTRIES = (
    *((inputs, kind, Selection(topk=topk)) for inputs in ("random", "agreeing") for kind, (topk, _) in LAYERS.items()),
    *(("random", kind, BY_THRESHOLD) for kind in LAYERS),
    # about what the threshold keeps
    ("random", "spatio_temporal", Selection(topk=13)),
    *(("smooth", kind, Selection(topk=topk)) for kind, (topk, _) in LAYERS.items()),
    *((inputs, kind, BY_THRESHOLD) for inputs in ("smooth", "agreeing") for kind in LAYERS),
)


def make_inputs(kind, grid, chunks, case, device):
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def noise():
        return torch.randn(case.B, case.S_q, case.H, case.D, generator=generator, device=device)

    def smooth():
        """A field that varies slowly over the video, and noise: neighbours choose alike, as in real videos."""
        coarse = torch.randn(case.B, case.H * case.D, 5, 6, 4, generator=generator, device=device)
        field = F.interpolate(coarse, grid, mode="trilinear", align_corners=True)
        field = field.reshape(case.B, case.H, case.D, case.S_q).permute(0, 3, 1, 2)
        return field / field.std() * 2 + 0.3 * noise()

    q, k = (smooth() if kind == "smooth" else noise() for _ in range(2))
    if kind == "agreeing":
        tokens = torch.arange(case.S_q, device=device)
        q = from_chunk_order(q[:, tokens // RANGE * RANGE] + AGREEING_NOISE * q[:, tokens.flip(0)], chunks)
    return tuple(x.to(dtype).contiguous() for x in (q, k, noise(), noise()))


def union_ratio(q, k, chunks, how):
    """Chunks that one of RANGE neighbours chose, by the mean number that each of them chose."""
    chosen = unpack_bits(select_bits(q, k, chunks, how), chunks.num_chunks)  # [B, H, C, S]
    ranges = chosen[..., : chosen.shape[3] // RANGE * RANGE].unflatten(3, (-1, RANGE))
    return float(ranges.any(4).sum() * RANGE / ranges.sum())


def peak_mib(run, inputs):
    """MiB of the inputs and of all that a run holds at once."""
    device = inputs[0].device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    own = torch.cuda.max_memory_allocated(device) - before
    return (own + sum(x.numel() * x.element_size() for x in inputs)) / 2**20


def host_ms(run, device, repetitions=5):
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repetitions):
        run()
    took = (time.perf_counter() - started) / repetitions * 1e3
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return took


def measure_rows(case, backend, engine, attend, pattern, inputs, clock, environment, budget_s, *, is_peer=False):
    """One row for each direction; a red gate gives no number."""
    q, k, v, dout = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return attend(q, k, v)

    def both():
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    held = [attend(*leaves)]

    def backward():
        return torch.autograd.grad(held[0], leaves, dout, retain_graph=True)

    report = check_samples(q, k, v, held[0].detach(), pattern, dout=dout, grads=backward())
    timings = {}
    if not report.problem:
        timings = {"forward": measure(forward, clock, budget_s=budget_s)}
        timings["backward"] = measure(backward, clock, budget_s=budget_s)
    # the graph must not count towards the peaks
    held.clear()
    rows = []
    for direction, run in (("forward", forward), ("backward", both)):
        row = make_row(
            case,
            direction,
            environment,
            backend=backend,
            engine=engine,
            is_peer=is_peer,
            gate="red" if report.problem else "green",
            errors=report.errors,
            timing=timings.get(direction),
            pairs=pattern.pairs(),
            refused=f"the results are wrong: {report.problem}" if report.problem else "",
        )
        if not report.problem:
            # the peak of the backward row is that of both passes together
            row |= {"host_ms": host_ms(run, q.device), "peak_mib": peak_mib(run, inputs)}
        rows.append(row)
    return rows


def released_vmoba():
    """The released implementation; raises ImportError where it, or flash-attn, is missing."""
    from fastvideo.attention.backends.vmoba import VMOBAAttentionBackend

    return VMOBAAttentionBackend


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny video and few runs")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds after which no entry is begun")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = torch.device(arguments.device)
    grid = QUICK_GRID if arguments.quick else GRID
    length = math.prod(grid)
    budget_s = 0.02 if arguments.quick else 0.5
    clock = make_clock(device)
    environment = describe_environment(device, commit=os.environ.get("COMMIT"))
    base = Case(name="dense", S_q=length)
    if arguments.quick:
        base = dataclasses.replace(base, H=2, H_kv=2, D=32)
    if device.type == "cpu":
        base = dataclasses.replace(base, dtype="float32")
    rows = []

    def keep(found):
        rows.extend(found)
        write_rows(arguments.output, rows)
        for row in found:
            number = f"{row['median_ms']:.3f} ms" if row["median_ms"] else row["refused"][:200]
            more = " ".join(
                f"{key} {row[key]:.2f}" for key in ("host_ms", "peak_mib", "union_ratio") if row.get(key) is not None
            )
            what = " ".join(row[key] for key in ("case", "lists", "backend", "direction"))
            sys.stdout.write(f"{time.monotonic() - started:6.1f} s  {what}: {number} {more}\n")
        sys.stdout.flush()

    inputs, inputs_kind = make_inputs("random", grid, None, base, device), "random"
    dense = sdpa_cudnn(base) if device.type == "cuda" else sdpa_flash(base)

    def attend_dense(q, k, v):
        return dense.attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    measured = (clock, environment, budget_s)
    keep(measure_rows(base, "SDPA", dense.engine, attend_dense, dense.pattern, inputs, *measured, is_peer=True))
    for kind, layer, how in ENTRIES:
        if time.monotonic() - started > arguments.limit:
            sys.stdout.write(f"{kind} {layer} {how}: not begun, {arguments.limit:g} s are over\n")
            continue
        chunks = resolve_chunks(grid, CHUNK_SIZES[layer][arguments.quick])
        if kind != inputs_kind or kind == "agreeing":
            inputs, inputs_kind = make_inputs(kind, grid, chunks, base, device), kind
        pattern = ChosenPattern(*inputs[:2], chunks, how)
        share = pattern.pairs() / (base.B * base.H * length**2)
        choice = f"top-k {how.topk}" if how.mode == "topk" else f"threshold {how.threshold}"
        case = dataclasses.replace(base, name=f"vmoba_{layer}", lists=f"{kind}, {choice}", keep=round(share, 4))

        def attend(q, k, v, chunks=chunks, how=how):
            return attend_chunks(q, k, v, chunks, how)

        engine = "triton" if device.type == "cuda" else "reference"
        ratio = round(union_ratio(*inputs[:2], chunks, how), 3) if length >= RANGE else None
        found = measure_rows(case, "VMOBA_ATTN", engine, attend, pattern, inputs, *measured)
        keep([row | {"union_ratio": ratio} for row in found])
        del pattern
    try:
        released_vmoba()
        reason = "this benchmark does not run it yet"
    except ImportError as error:
        reason = f"ImportError: {error}"
    keep(refused_rows(base, environment, backend="FASTVIDEO_VMOBA", engine="flash-attn", is_peer=True, refused=reason))
    return 0


if __name__ == "__main__":
    sys.exit(main())
