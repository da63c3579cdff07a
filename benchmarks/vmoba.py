"""VMOBA_ATTN next to dense attention: times and peak memory of top-k per query, on random and on smooth inputs.

    python benchmarks/vmoba.py benchmarks/results/vmoba.json
    python benchmarks/vmoba.py out.json --device cpu --quick       (a dry run: the reference on a tiny video)

Every number comes after a check of sampled rows and keys in the same process. Times are of whole calls: the choice, the
reordering and the attention. `host_ms` is what a call takes the host until it returns; `peak_mib` counts q, k, v, dout and all
that a call allocates. The released VMoBA is a row with a reason where its packages are missing.
"""

import argparse
import dataclasses
import os
import sys
import time

import torch
from peers.sdpa import sdpa_cudnn, sdpa_flash
from torch.nn import functional as F

from attnmux.bench import Case, check_samples, describe_environment, make_clock, measure, refused_rows, write_rows
from attnmux.bench.record import make_row
from attnmux_vmoba.ops import attend_chunks, select_chunks
from attnmux_vmoba.prepare import Selection, from_chunk_order, resolve_chunks, self_chunks

GRID, QUICK_GRID = (20, 48, 32), (5, 8, 8)
# name: (chunk size, chunk size of a quick run, top-k)
LAYERS = {
    "temporal": (4, 1, 3),
    "spatial": ((12, 8), (4, 4), 3),
    "spatio_temporal": ((4, 12, 8), (1, 4, 4), 8),
}


class ChosenPattern:
    """Which keys the chosen chunks of q and k mean; the `Pattern` of the correctness gate. The choice itself is held by tests."""

    def __init__(self, q, k, grid, chunk_size, topk):
        chunks = resolve_chunks(grid, chunk_size)
        chosen = select_chunks(q, k, patch_resolution=grid, chunk_size=chunk_size, topk=topk)  # [B, H, C, S]
        self._chosen = from_chunk_order(chosen.permute(0, 3, 1, 2), chunks)  # [B, S, H, C]
        own = self_chunks(chunks, q.device).int().argmax(0)  # [S], in chunk order
        self._chunk = from_chunk_order(own[None, :, None, None], chunks)[0, :, 0, 0]
        sizes = torch.bincount(own, minlength=chunks.num_chunks)
        self._pairs = int((chosen.sum((0, 1, 3)) * sizes).sum())

    def visible(self, batch, head, rows, keys):
        return self._chosen[batch, rows, head][:, self._chunk[keys]]

    def pairs(self):
        return self._pairs


def make_inputs(kind, grid, case, device):
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
    return tuple(x.to(dtype).contiguous() for x in (q, k, noise(), noise()))


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
    parser.add_argument("--limit", type=float, default=75.0, help="seconds after which no entry is begun")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = torch.device(arguments.device)
    grid = QUICK_GRID if arguments.quick else GRID
    length = grid[0] * grid[1] * grid[2]
    budget_s = 0.02 if arguments.quick else 0.25
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
            more = " ".join(f"{key} {row[key]:.2f}" for key in ("host_ms", "peak_mib") if row.get(key) is not None)
            sys.stdout.write(
                f"{time.monotonic() - started:6.1f} s  {row['case']} {row['backend']} {row['direction']}: {number} {more}\n"
            )
        sys.stdout.flush()

    for kind in ("random", "smooth"):
        inputs = make_inputs(kind, grid, base, device)
        if kind == "random":
            dense = sdpa_cudnn(base) if device.type == "cuda" else sdpa_flash(base)

            def attend_dense(q, k, v, dense=dense):
                return dense.attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

            keep(
                measure_rows(
                    base,
                    "SDPA",
                    dense.engine,
                    attend_dense,
                    dense.pattern,
                    inputs,
                    clock,
                    environment,
                    budget_s,
                    is_peer=True,
                )
            )
        for layer, (full_chunk, quick_chunk, topk) in LAYERS.items():
            if time.monotonic() - started > arguments.limit:
                sys.stdout.write(f"{kind} {layer}: not begun, {arguments.limit:g} s are over\n")
                continue
            chunk_size = quick_chunk if arguments.quick else full_chunk
            chunks = resolve_chunks(grid, chunk_size)
            pattern = ChosenPattern(*inputs[:2], grid, chunk_size, topk)
            share = min(1.0, topk / chunks.num_chunks)
            case = dataclasses.replace(base, name=f"vmoba_{layer}", lists=kind, keep=share)
            how = Selection(topk=topk)

            def attend(q, k, v, chunks=chunks, how=how):
                return attend_chunks(q, k, v, chunks, how)

            engine = "triton" if device.type == "cuda" else "reference"
            keep(measure_rows(case, "VMOBA_ATTN", engine, attend, pattern, inputs, clock, environment, budget_s))
            del pattern
        del inputs
    try:
        released_vmoba()
        reason = "this benchmark does not run it yet"
    except ImportError as error:
        reason = f"ImportError: {error}"
    keep(refused_rows(base, environment, backend="FASTVIDEO_VMOBA", engine="flash-attn", is_peer=True, refused=reason))
    return 0


if __name__ == "__main__":
    sys.exit(main())
