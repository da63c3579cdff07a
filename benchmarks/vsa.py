"""The whole Video Sparse Attention, raster to raster with its gate, next to its fine kernel alone and to its peers.

    python benchmarks/vsa.py benchmarks/results/vsa.json
    python benchmarks/vsa.py out.json --device cpu --quick     (a dry run: the reference engine on tiny shapes)

Every number comes after a check: one head of the output and of the gradients against the float64 reference in the same process.
All of ours come before the peers. A CUDA graph's row is the device's time without the host's launches; its output is compared
bit by bit with that of the call. Peers: torch's dense attention by cuDNN, and fastvideo-kernel's operator where it is
importable; its tokens come in tiles, which its users pay for separately. The file is written after each measurement. The
environment variable COMMIT names the commit where there is no git.
"""

import argparse
import dataclasses
import functools
import sys

import torch
from peers import DENSE_PEERS
from peers.fastvideo_vsa import video_sparse_attention as fastvideo
from run import Run, captured

from attnmux.bench import Case, measure
from attnmux.bench.record import make_row
from attnmux.testing import measure_error
from attnmux_blocksparse import BlockIndex, block_sparse_attention
from attnmux_vsa.bench import CASES, TilePattern, make_tiling
from attnmux_vsa.ops import select_tiles, video_sparse_attention
from attnmux_vsa.prepare import tile_tokens

OURS = "VIDEO_SPARSE_ATTN"
LIMIT = 1e-2
"""Largest relative L2 error of the gate: the error rule's, for gradients."""


def draw(case, device):
    """q, k, v, gate and the output's gradient."""
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (case.B, case.S_q, case.H, case.D), getattr(torch, case.dtype)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(5)]


def attend(q, k, v, gate, tiling, engine=None):
    return video_sparse_attention(q, k, v, tiling, gate_compress=gate, engine=engine)


def check(tiling, tensors):
    """Relative L2 errors of head 0: the output, and the gradients of q, k, v and the gate."""
    *inputs, dout = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, tiling)
    grads = torch.autograd.grad(out, leaves, dout)
    heads = [x[:, :, :1].detach().double().requires_grad_() for x in inputs]
    exact = attend(*heads, tiling, engine="reference")
    exact_grads = torch.autograd.grad(exact, heads, dout[:, :, :1].double())
    pairs = zip(("out", "dq", "dk", "dv", "dgate"), (out, *grads), (exact, *exact_grads), strict=True)
    return {name: measure_error(ours[:, :, :1], theirs).relative_l2 for name, ours, theirs in pairs}


def runs_of(case, tiling, tensors, device):
    """What is measured of us: (engine, direction, function)."""
    *inputs, dout = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    yield "operator", "forward", torch.no_grad()(lambda: attend(*inputs, tiling))
    out = attend(*leaves, tiling)
    yield "operator", "backward", lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    volume, sizes = case.block_q, tiling.variable_block_sizes
    blocks = select_tiles(*inputs[:2], tiling).int()
    index = BlockIndex(
        blocks, blocks.new_full(blocks.shape[:3], blocks.shape[3]), num_key_blocks=len(sizes), block_q=volume,
        block_k=volume, k_lengths=sizes if tiling.has_padding else None, finite_padding=True, even_rows=True,
    )  # fmt: skip
    tiled = [
        tile_tokens(x, tiling.slot_of_token, len(sizes), volume).flatten(2, 3).transpose(1, 2)
        for x in (*inputs[:3], dout)
    ]
    yield "fine kernel alone", "forward", torch.no_grad()(lambda: block_sparse_attention(*tiled[:3], index))
    tiled_leaves = [x.detach().requires_grad_() for x in tiled[:3]]
    fine = block_sparse_attention(*tiled_leaves, index)
    yield (
        "fine kernel alone", "backward",
        lambda: torch.autograd.grad(fine, tiled_leaves, tiled[3], retain_graph=True),
    )  # fmt: skip
    yield "operator, no gate", "forward", torch.no_grad()(lambda: attend(*inputs[:3], None, tiling))


def peak_of_step(run, tensors):
    """Bytes at the peak of one forward and backward pass above what its inputs take, inputs counted in."""
    *inputs, dout = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - sum(x.numel() * x.element_size() for x in tensors)
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(run(*leaves), leaves, dout)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def dense_attention(q, k, v):
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2)


def fastvideo_rows(case, tiling, tensors, pairs, clock, environment, budget_s):
    """Its forward and backward, after a check against ours: it chooses by rounded scores, so that tiles differ."""
    *inputs, dout = (
        tile_tokens(x, tiling.slot_of_token, len(tiling.variable_block_sizes), case.block_q).flatten(2, 3).contiguous()
        for x in tensors
    )
    run = fastvideo(case, tiling)
    leaves = [x.requires_grad_() for x in inputs]
    out = run(*leaves)
    ours = attend(*tensors[:4], tiling)
    theirs = out.detach().transpose(1, 2)[:, tiling.slot_of_token]
    errors = {"out against ours": measure_error(theirs, ours.double()).relative_l2}
    # a tile in two hundred is another one, and the rest agrees
    is_green = errors["out against ours"] < 0.2

    def row(direction, function):
        timing = measure(function, clock, budget_s=budget_s) if is_green else None
        return make_row(
            case, direction, environment, backend="FASTVIDEO", engine="triton, tokens in tiles", is_peer=True,
            gate="green" if is_green else "red", errors=errors, timing=timing, pairs=pairs,
            refused="" if is_green else f"errors {errors}",
        )  # fmt: skip

    yield row("forward", torch.no_grad()(lambda: run(*inputs)))
    yield row("backward", lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))


class VsaRun(Run):
    """A run of this benchmark."""

    def measure_ours(self, case):
        """Check a case, then add our rows."""
        tiling, tensors = make_tiling(case, self.device), draw(case, self.device)
        errors = check(tiling, tensors)
        is_green = max(errors.values()) <= LIMIT
        self.say(f"{case.name} {case.lists}: {errors}")
        pairs = TilePattern(tiling, select_tiles(*tensors[:2], tiling)).pairs()
        extra = {}
        if self.device.type == "cuda":
            extra = {
                "peak_bytes_of_step": peak_of_step(lambda *x: attend(*x, tiling), tensors),
                "peak_bytes_of_dense_step": peak_of_step(dense_attention, [*tensors[:3], tensors[4]]),
            }
            self.say(f"  {extra}")

        def row(engine, direction, run):
            timing = measure(run, self.clock, budget_s=self.budget_s) if is_green else None
            refused = "" if is_green else f"errors {errors} exceed {LIMIT}"
            return {
                **make_row(
                    case, direction, self.environment, backend=OURS, engine=engine,
                    gate="green" if is_green else "red", errors=errors, timing=timing, pairs=pairs, refused=refused,
                ),
                **extra,
            }  # fmt: skip

        if self.device.type == "cuda":
            engine, whole = "operator, CUDA graph", torch.no_grad()(lambda: attend(*tensors[:4], tiling))
            self.add_or_refuse(
                dataclasses.replace(case, directions=("forward",)),
                lambda: [row(engine, "forward", captured(whole))],
                backend=OURS, engine=engine, is_peer=False,
            )  # fmt: skip
        for engine, direction, run in runs_of(case, tiling, tensors, self.device):
            self.add(row(engine, direction, run))

    def measure_fastvideo(self, case):
        tiling, tensors = make_tiling(case, self.device), draw(case, self.device)
        pairs = TilePattern(tiling, select_tiles(*tensors[:2], tiling)).pairs()
        rows = fastvideo_rows(case, tiling, tensors, pairs, self.clock, self.environment, self.budget_s)
        self.add_or_refuse(case, lambda: rows, backend="FASTVIDEO", engine="triton, tokens in tiles", is_peer=True)

    def measure_dense(self, case):
        dense = Case(name=case.name, S_q=case.S_q, H=case.H, D=case.D, dtype=case.dtype)
        make = functools.partial(DENSE_PEERS["SDPA", "cudnn"], dense)
        self.add_workload(dense, make, backend="SDPA", engine="cudnn", is_peer=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few runs")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for the timed runs of one number")
    parser.add_argument("--limit", type=float, default=165.0, help="seconds after which nothing is begun")
    arguments = parser.parse_args()
    run = VsaRun(arguments)
    cases = [case.shrunk() if arguments.quick else case for case in CASES[OURS]]
    if run.device.type == "cpu":
        cases = [dataclasses.replace(case, dtype="float32") for case in cases]
    # ours first, so that no peer's compilation takes the time of a case; dense attention once for a length
    lengths = {case.S_q: case for case in reversed(cases)}
    steps = [
        *(("ours", run.measure_ours, case) for case in cases),
        *(("SDPA", run.measure_dense, case) for case in reversed(lengths.values())),
        *(("FASTVIDEO", run.measure_fastvideo, case) for case in cases),
    ]
    for name, step, case in steps:
        if run.seconds() > arguments.limit:
            run.say(f"{name}, {case.name} {case.lists}: not begun, {arguments.limit:g} s are over")
            continue
        step(case)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
