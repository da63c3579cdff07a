"""The whole SLA module next to its sparse branch alone and to its peers: one table, measured in one run.

    python benchmarks/sla.py benchmarks/results/sla.json
    python benchmarks/sla.py out.json --parts           (also every kernel on its own)
    python benchmarks/sla.py out.json --device cpu --quick     (a dry run: the reference engine on tiny shapes)

Every number comes after a check: one head of the module's output and gradients against float64 in the same process. Peers: torch's
own dense attention, and `sparse_linear_attention` of the public SLA package where that is importable. A CUDA graph's row is the
device's time without the host's launches. The file is written after each measurement. The environment variable COMMIT names the
commit where there is no git.
"""

import argparse
import dataclasses
import functools
import sys

import torch
from peers import DENSE_PEERS
from peers.sla_main import sla_main
from run import Run, captured

from attnmux.bench import measure
from attnmux.bench.record import make_row
from attnmux.testing import measure_error
from attnmux_blocksparse import block_sparse_attention, select_top_blocks
from attnmux_sla import SLAAttentionImpl, select_blocks
from attnmux_sla.bench import CASES
from attnmux_sla.reference import linear_attention

OURS = "SLA_ATTN"
PEERS = (("SLA", "main branch", sla_main), ("SDPA", "cudnn", DENSE_PEERS["SDPA", "cudnn"]))
LIMIT = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-4}
"""Largest relative L2 error of the gate: the error rule's, for gradients."""


def draw(case, device):
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    return [
        torch.randn(case.B, length, heads, case.D, generator=generator, device=device, dtype=dtype)
        for length, heads in ((case.S_q, case.H), (case.S_k, case.H_kv), (case.S_k, case.H_kv), (case.S_q, case.H))
    ]


def make_impl(case, device):
    """A layer as after training: its projection is not zero."""
    impl = SLAAttentionImpl(case.H, case.D, topk_ratio=case.keep, BLKQ=case.block_q, BLKK=case.block_k).to(device)
    generator = torch.Generator(device).manual_seed(1)
    for parameter in impl.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, device=device)
        parameter.data.copy_(drawn * case.D**-0.5)
    return impl


def exact_head(impl, case, index, q, k, v):
    """The module's output for head 0 in float64, differentiable; tokens in whole blocks."""
    blocks = index.blocks[:, 0].flatten(0, 1).long()
    rows = q[:, :, 0].unflatten(1, (-1, case.block_q)).flatten(0, 1)  # [B * N_q, block_q, D]
    first = torch.arange(case.B, device=q.device).repeat_interleave(index.num_query_blocks) * index.num_key_blocks
    keys, values = (x[:, :, 0].unflatten(1, (-1, case.block_k)).flatten(0, 1) for x in (k, v))
    out = []
    for start in range(0, len(rows), 64):
        part = slice(start, start + 64)
        listed = blocks[part] + first[part, None]
        weights = (rows[part] @ keys[listed].flatten(1, 2).transpose(1, 2) * case.D**-0.5).softmax(-1)
        out.append(weights @ values[listed].flatten(1, 2))
    sparse = torch.cat(out).view(case.B, case.S_q, 1, case.D)
    linear = linear_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], feature_map="softmax")
    return sparse + torch.nn.functional.linear(linear, impl.proj_l.weight.double(), impl.proj_l.bias.double())


def gate(impl, case, index, tensors):
    """Relative L2 errors of head 0: the output, and the gradients of q, k and v."""
    *leaves, dout = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = impl(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    heads = [x[:, :, :1].detach().double().requires_grad_() for x in leaves]
    exact = exact_head(impl, case, index, *heads)
    exact_grads = torch.autograd.grad(exact, heads, dout[:, :, :1].double())
    pairs = zip(("out", "dq", "dk", "dv"), (out, *grads), (exact, *exact_grads), strict=True)
    return {name: measure_error(ours[:, :, :1], theirs).relative_l2 for name, ours, theirs in pairs}


def timed_rows(case, impl, index, tensors, errors, clock, environment, budget_s):
    """Forward and backward of the module, and of its sparse branch alone."""
    *inputs, dout = tensors
    is_green = max(errors.values()) <= LIMIT[case.dtype]
    pairs = case.B * case.H * case.S_q * index.blocks.shape[3] * case.block_k

    def row(engine, direction, run, pairs=pairs):
        timing = measure(run, clock, budget_s=budget_s) if is_green else None
        return make_row(
            case, direction, environment, backend=OURS, engine=engine, gate="green" if is_green else "red",
            errors=errors, timing=timing, pairs=pairs,
            refused="" if is_green else f"errors {errors} exceed {LIMIT[case.dtype]}",
        )  # fmt: skip

    def sparse_only(q, k, v):
        return block_sparse_attention(q, k, v, index)

    for engine, attend in (("module", impl), ("sparse branch alone", sparse_only)):
        with torch.no_grad():
            yield row(engine, "forward", lambda attend=attend: attend(*inputs))
        leaves = [x.detach().requires_grad_() for x in inputs]
        wanted = [*leaves, *(impl.parameters() if attend is impl else ())]
        yield row(f"{engine}, with autograd", "forward", lambda attend=attend, leaves=leaves: attend(*leaves))
        out = attend(*leaves)
        yield row(
            engine,
            "backward",
            lambda out=out, wanted=wanted: torch.autograd.grad(out, wanted, dout, retain_graph=True),
        )
    with torch.no_grad():

        def block_lists():
            return select_blocks(*inputs[:2], topk_ratio=case.keep).blocks

        yield row("block map alone", "forward", block_lists, pairs=0)
        if inputs[0].is_cuda:
            yield row("module, CUDA graph", "forward", captured(lambda: impl(*inputs)))
            yield row("block map alone, CUDA graph", "forward", captured(block_lists), pairs=0)


def part_times(case, impl, index, tensors, clock, budget_s):
    """Milliseconds of every kernel of the Triton engine."""
    from attnmux_sla.kernels import launch

    q, k, v, dout = tensors
    weight, bias = impl.proj_l.weight.detach(), impl.proj_l.bias.detach()
    pooled_q = launch.pool(q, case.block_q)
    pooled_k, state, mass = launch.summarize_keys(k, v, case.block_k, "softmax")
    kept = index.blocks.shape[3]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    runs = {
        "pool q": lambda: launch.pool(q, case.block_q),
        "pool k (not in the module)": lambda: launch.pool(k, case.block_k),
        "summarize k, v": lambda: launch.summarize_keys(k, v, case.block_k, "softmax"),
        "top-k": lambda: select_top_blocks(pooled_q, pooled_k, kept),
        "fold": lambda: launch._fold(state, mass, weight, q.dtype),
        "fold + add linear branch": lambda: launch.add_linear_branch(q, q, state, mass, weight, bias, "softmax"),
        "transpose lists": lambda: torch.ops.attnmux_blocksparse.transpose(
            index.blocks, index.counts, index.num_key_blocks
        ),
        "linear backward, all": lambda: launch.linear_backward(
            dout, q, k, v, state, mass, weight, "softmax", tuple(grads)
        ),
        "copy of q": lambda: q.clone(),
    }
    return {name: measure(run, clock, budget_s=budget_s).median_ms for name, run in runs.items()}


def profile_kernels(run, count=5):
    """Microseconds of every kernel per call of `run`, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(count):
            run()
        torch.cuda.synchronize()
    return {event.key[:60]: event.device_time_total / count for event in found.key_averages()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few runs")
    parser.add_argument("--parts", action="store_true", help="also times of single kernels, printed only")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--only", default="", help="only cases whose name, length or ratio contain this")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds for the timed runs of one number")
    parser.add_argument("--limit", type=float, default=165.0, help="seconds after which no case is begun")
    arguments = parser.parse_args()
    run = Run(arguments)
    device = run.device
    for case in CASES[OURS]:
        title = f"{case.name} S={case.S_q} keep={case.keep}"
        if arguments.only not in title:
            continue
        if run.seconds() > arguments.limit:
            run.say(f"{title}: not begun, {arguments.limit:g} s are over")
            continue
        if arguments.quick:
            case = case.shrunk()
        if device.type == "cpu":
            case = dataclasses.replace(case, dtype="float32")
        tensors = draw(case, device)
        impl = make_impl(case, device)
        index = select_blocks(*tensors[:2], topk_ratio=case.keep, block_q=case.block_q, block_k=case.block_k)
        errors = gate(impl, case, index, tensors)
        run.say(f"{title}: errors {', '.join(f'{name} {error:.1e}' for name, error in errors.items())}")
        for row in timed_rows(case, impl, index, tensors, errors, run.clock, run.environment, run.budget_s):
            run.add(row)
        if arguments.parts and device.type == "cuda":
            for name, milliseconds in part_times(case, impl, index, tensors, run.clock, run.budget_s).items():
                run.say(f"    {name}: {milliseconds:.4f} ms")
            leaves = [x.detach().requires_grad_() for x in tensors[:3]]
            wanted = [*leaves, *impl.parameters()]

            def train(leaves=leaves, wanted=wanted, impl=impl, dout=tensors[3]):
                return torch.autograd.grad(impl(*leaves), wanted, dout)

            for name, microseconds in profile_kernels(train).items():
                if microseconds > 1:
                    run.say(f"    {microseconds:8.1f} us  {name}")
        if not arguments.no_peers:
            for backend, engine, peer in PEERS:
                run.add_workload(case, functools.partial(peer, case), backend=backend, engine=engine, is_peer=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
