"""Attention over several GPUs: how much of the speed of one is left when they share a sequence.

    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py distributed.json --plot distributed.png
    python benchmarks/distributed.py out.json                  (one GPU: what the layer costs at one rank)
    torchrun --nproc-per-node 2 benchmarks/distributed.py out.json --device cpu --quick     (a dry run)
    torchrun --nproc-per-node 2 benchmarks/distributed.py out.json --rehearse               (on one GPU that ranks share)

The sequence is Wan 14B's: 75,600 tokens of 40 heads of 128 channels in bfloat16. Efficiency is T1 / (P * TP): T1 is LocalAttention
on the whole sequence, on all ranks at once, as heat and power are shared; TP the distributed layer. Ranks are aligned before
each run and the slowest counts; T1 and TP are measured in turn, and a row whose T1 drifts by more than 2 % says so.
Nothing is timed whose result is wrong on a short sequence in the same process. On one GPU it times one rank's share of the work,
transfers left out, an upper bound of the efficiency, and what the layer adds where it is alone. What is computed and not
measured, for more GPUs than there are, is in rows of their own, made from this run's numbers alone. A rehearsal runs every
case and its gate, over gloo and on a short video; what it would time means nothing, and is not kept.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_table import FASTER, plot
from left_out import LeftOut
from peers import diffusers_ulysses, fastvideo_ulysses
from torch.profiler import ProfilerActivity, profile

from attnmux import DistributedAttention, LocalAttention, SeqPlan, SPGroup, init_sequence_parallel
from attnmux.bench import describe_environment
from attnmux.bench.harness import CpuClock, Timing
from attnmux.distributed import HeadPlan, count_traffic
from attnmux.distributed.collective import describe
from attnmux.distributed.direct import direct_of
from attnmux.distributed.exchange import Exchange, arrived_heads, arrived_shards, send_heads, send_shards
from attnmux.distributed.merge import merge_part
from attnmux.errors import AttnmuxError
from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle

# tokens as a video, heads, channels
WAN, QUICK = ((21, 45, 80), 40, 128), ((4, 8, 8), 32, 64)
SPARSITY = 0.9
DRIFT = 0.02
WARM_UP = 3
DENSE = ("TORCH_SDPA", "FLASH_ATTN")
ULYSSES = (("ulysses", 1), ("ulysses", 2), ("ulysses", 4))
STRATEGIES = (*ULYSSES, ("ring", 1), ("allgather_kv", 1))


class Shape:
    def __init__(self, grid, heads, dim, dtype, device):
        self.grid, self.heads, self.dim, self.dtype, self.device = grid, heads, dim, dtype, device
        self.tokens = grid[0] * grid[1] * grid[2]

    def draw(self, rows=None, heads=None, seed=0):
        generator = torch.Generator(self.device).manual_seed(seed)
        size = (1, self.tokens if rows is None else rows, self.heads if heads is None else heads, self.dim)
        return [torch.randn(size, generator=generator, device=self.device, dtype=self.dtype) for _ in range(3)]


def in_turn(device, runs, repetitions):
    """Milliseconds of each of several runs, one after the other; ranks start together, and the slowest counts."""
    if device.type == "cuda":
        flag, events = torch.zeros(1, device=device), []
        for _ in range(repetitions):
            for run in runs:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # a collective on the stream: no rank starts before the last has come
                dist.all_reduce(flag)
                start.record()
                run()
                end.record()
                events.append((start, end))
        torch.cuda.synchronize(device)
        times = [start.elapsed_time(end) for start, end in events]
    else:
        times = []
        for _ in range(repetitions):
            for run in runs:
                dist.barrier()
                times += CpuClock().milliseconds(run, 1)
    slowest = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return [slowest[which :: len(runs)].tolist() for which in range(len(runs))]


def aligned(device, run, repetitions):
    return in_turn(device, [run], repetitions)[0]


def compare(device, single, several, repetitions):
    """T1 and TP in turn, so that heat and power are alike; and by how much T1 of the first half and of the second differ."""
    in_turn(device, [single, several], WARM_UP)
    alone, shared = in_turn(device, [single, several], repetitions)
    halves = [statistics.median(part) for part in (alone[: repetitions // 2], alone[repetitions // 2 :])]
    return Timing.of(alone), Timing.of(shared), abs(halves[0] / halves[1] - 1)


def backend_options(backend, shape):
    """Constructor arguments and metadata of a backend at the benchmark's sparsity."""
    if backend == "SLA_ATTN":
        return {"topk_ratio": 1 - SPARSITY}, None
    if backend == "VIDEO_SPARSE_ATTN":
        from attnmux_vsa.backend import VideoSparseAttentionMetadataBuilder

        build = VideoSparseAttentionMetadataBuilder().build
        # 4 x 4 x 4 divides no side of 21 x 45 but 80: tiles of other shapes cover the rest
        return {}, build(0, shape.grid, (1, 1, 1), SPARSITY, device=shape.device, tile_policy="adaptive")
    return {}, None


def layers(backend, strategy, shape, sp, overlap=1):
    options, metadata = backend_options(backend, shape)
    options = {"backend": backend, "dtype": shape.dtype, **options}
    made = (
        LocalAttention(shape.heads, shape.dim, **options),
        DistributedAttention(shape.heads, shape.dim, sp_group=sp, strategy=strategy, overlap=overlap, **options),
    )
    return *(layer.to(shape.device) for layer in made), metadata


def shard(tensors, plan, rank):
    first, last = plan.range_of(rank)
    return [x[:, first:last].contiguous() for x in tensors]


def short_of(shape):
    return Shape((5, 8, 9), shape.heads, shape.dim, shape.dtype, shape.device)


def results(function, tensors, weight, direction):
    """The output, and the gradients where the direction has them."""
    trains = direction != "forward"
    leaves = [x.detach().requires_grad_(trains) for x in tensors]
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, weight.to(output.dtype)) if trains else ()
    return [output.detach(), *gradients]


def gate(attend, small, sp, direction, *, same_bits_as=None):
    """Return nothing where a short sequence comes out right on every rank, else what is wrong."""
    tensors = small.draw()
    weight = tensors[2].flip(1)
    plan = SeqPlan.balanced(small.tokens, sp.size)
    own = slice(*plan.range_of(sp.rank))
    problem = ""
    found = results(attend, shard(tensors, plan, sp.rank), weight[:, own], direction)
    if same_bits_as is not None:
        # heads choose for themselves
        want = results(same_bits_as, tensors, weight, direction)
        if not all(torch.equal(x, y[:, own]) for x, y in zip(found, want, strict=True)):
            problem = "other bits than LocalAttention"
    else:
        oracle = results(dense_attention_oracle, [x.double() for x in tensors], weight, direction)
        baseline = results(dense_attention_baseline, tensors, weight, direction)
        try:
            for which, x in enumerate(found):
                kind = "gradient" if which else "output"
                assert_close_to_oracle(x, oracle[which][:, own], baseline[which][:, own], kind=kind)
        except AssertionError as error:
            problem = str(error)
    problems = [""] * sp.size
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def gate_layers(backend, strategy, shape, sp, overlap, direction):
    small = short_of(shape)
    local, several, metadata = layers(backend, strategy, small, sp, overlap)
    plan = SeqPlan.balanced(small.tokens, sp.size)
    is_exact = local.selection.spec.capabilities.exactness == "exact"
    return gate(
        lambda q, k, v: several(q, k, v, plan=plan, attn_metadata=metadata)[0],
        small,
        sp,
        direction,
        same_bits_as=None if is_exact else lambda q, k, v: local(q, k, v, attn_metadata=metadata),
    )


def without_gradients(function, *arguments, **options):
    def run():
        with torch.no_grad():
            function(*arguments, **options)

    return run


def with_gradients(function, *arguments, **options):
    leaves = [x.detach().requires_grad_() for x in arguments]

    def run():
        result = function(*leaves, **options)
        output = result[0] if isinstance(result, tuple) else result
        torch.autograd.grad(output, leaves, torch.ones_like(output))

    return run


def measure_strategy(backend, strategy, overlap, shape, sp, arguments, direction):
    row = {"backend": backend, "strategy": strategy, "overlap": overlap, "direction": direction, "peer": False}
    try:
        local, several, metadata = layers(backend, strategy, shape, sp, overlap)
        problem = gate_layers(backend, strategy, shape, sp, overlap, direction)
    except (AttnmuxError, ImportError) as error:
        return {**row, "gate": "not run", "refused": str(error).splitlines()[0]}
    if problem:
        return {**row, "gate": "red", "refused": problem}
    plan = SeqPlan.balanced(shape.tokens, sp.size)
    tensors = shape.draw()
    own = shard(tensors, plan, sp.rank)
    wrap = without_gradients if direction == "forward" else with_gradients
    several_run = wrap(several, *own, plan=plan, attn_metadata=metadata)
    with count_traffic() as traffic:
        several_run()
    measured = compare(shape.device, wrap(local, *tensors, attn_metadata=metadata), several_run, arguments.repetitions)
    counted = {"collectives": traffic.collectives, "bytes_sent": traffic.bytes_sent}
    return {**row, "gate": "green", **counted, **times(*measured, sp.size, arguments)}


def times(single, shared, drift, size, arguments):
    if arguments.rehearse:
        return {"rehearsed": True}
    return {
        "t1_ms": single.median_ms,
        "t1_p20_ms": single.p20_ms,
        "t1_p80_ms": single.p80_ms,
        "tp_ms": shared.median_ms,
        "tp_p20_ms": shared.p20_ms,
        "tp_p80_ms": shared.p80_ms,
        "repetitions": shared.repetitions,
        "efficiency": single.median_ms / (size * shared.median_ms),
        "drift": drift,
        "drifted": drift > DRIFT,
    }


def measure_peer(name, make, shape, sp, arguments):
    """A peer of ulysses; `make` returns what it runs for the heads of one rank of a shape."""
    row = {"backend": name, "strategy": "ulysses", "overlap": 1, "direction": "forward", "peer": True}
    if shape.tokens % sp.size or shape.heads % sp.size:
        return {**row, "gate": "not run", "refused": "tokens and heads must be multiples of the ranks"}
    try:
        attend = make(shape)
    except ImportError as error:
        return {**row, "gate": "not run", "refused": f"{error}"}
    if problem := gate(attend, short_of(shape), sp, "forward"):
        return {**row, "gate": "red", "refused": problem}
    local = LocalAttention(shape.heads, shape.dim, backend="TORCH_SDPA", dtype=shape.dtype)
    plan = SeqPlan.balanced(shape.tokens, sp.size)
    tensors = shape.draw()
    runs = without_gradients(local, *tensors), without_gradients(attend, *shard(tensors, plan, sp.rank))
    measured = times(*compare(shape.device, *runs, arguments.repetitions), sp.size, arguments)
    return {**row, "gate": "green", **measured}


def make_diffusers(shape):
    return diffusers_ulysses.make_ulysses(shape.device)


def make_fastvideo(shape):
    heads = shape.heads // dist.get_world_size()
    return fastvideo_ulysses.make_ulysses(LocalAttention(heads, shape.dim, backend="TORCH_SDPA", dtype=shape.dtype))


def exchange(call, own):
    """Both exchanges of ulysses around no attention: q, k and v there, q back."""
    (under_way,) = send_heads(call, own, [])
    q, _, _ = arrived_heads(call, 0, under_way, 1, own[0].shape[3])
    arrived_shards(call, [send_shards(call, 0, q)], [q])


def measure_parts(shape, sp, repetitions):
    """The exchanges alone, and dense attention alone with the heads of one rank of more ranks than there are."""
    plan, heads = SeqPlan.balanced(shape.tokens, sp.size), HeadPlan.of(shape.heads, shape.heads, sp.size)
    own = shard(shape.draw(), plan, sp.rank)
    group = sp if sp.size > 1 else SPGroup.from_group(dist.group.WORLD)
    settings = describe(group, {"case": "exchange alone"})

    call = Exchange.of((heads,), "qkk", plan, sp.rank, settings)
    exchange_alone = partial(exchange, call, own)
    with torch.no_grad(), count_traffic() as traffic:
        exchange_alone()
    parts = {"bytes_sent": traffic.bytes_sent}
    aligned(shape.device, without_gradients(exchange_alone), 3)
    parts["exchange_ms"] = Timing.of(aligned(shape.device, without_gradients(exchange_alone), repetitions)).median_ms
    for ranks in (1, 2, 4, 8):
        few = LocalAttention(max(shape.heads // ranks, 1), shape.dim, backend="TORCH_SDPA", dtype=shape.dtype)
        run = without_gradients(few, *shape.draw(heads=max(shape.heads // ranks, 1)))
        aligned(shape.device, run, 3)
        found = Timing.of(aligned(shape.device, run, max(repetitions // 3, 3)))
        parts[f"attention_ms_of_{ranks}"] = found.median_ms
    return parts


def measure_one_rank(shape):
    """What the layer adds to LocalAttention where there are no other ranks: nothing on the device, and host time."""
    local, alone, _ = layers("TORCH_SDPA", "ulysses", shape, SPGroup.local())
    tensors = shape.draw(rows=128)

    def host_us(layer):
        run = without_gradients(layer, *tensors)
        run()
        best = float("inf")
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(50):
                run()
            best = min(best, time.perf_counter() - started)
        return best / 50 * 1e6

    found = {"host_us_local": host_us(local), "host_us_distributed": host_us(alone)}
    if shape.device.type == "cuda":
        for name, layer in (("local", local), ("distributed", alone)):
            run = without_gradients(layer, *shape.draw())
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                run()
                torch.cuda.synchronize()
            found[f"kernels_{name}"] = sorted(event.name for event in profiled.events())
            found[f"peak_bytes_{name}"] = torch.cuda.max_memory_allocated() - before
    return found


def measure_share(backend, shape, ranks, strategy, overlap, arguments):
    """One rank's share of the work on this GPU, transfers left out: what efficiency they leave to lose from."""
    row = {"backend": backend, "ranks": ranks, "strategy": strategy, "overlap": overlap}
    try:
        local, several, metadata = layers(backend, strategy, shape, SPGroup("left out", 0, ranks), overlap)
    except (AttnmuxError, ImportError) as error:
        return {**row, "refused": str(error).splitlines()[0]}
    tensors, plan = shape.draw(), SeqPlan.balanced(shape.tokens, ranks)
    run = without_gradients(several, *shard(tensors, plan, 0), plan=plan, attn_metadata=metadata)
    whole = without_gradients(local, *tensors, attn_metadata=metadata)
    (single, shared, drift), filled = LeftOut(shape.device).measure(
        lambda: compare(shape.device, whole, run, arguments.repetitions), arguments.repetitions + WARM_UP
    )
    found = times(single, shared, drift, ranks, arguments)
    for name in ("tp_ms", "tp_p20_ms", "tp_p80_ms"):
        found[name] -= filled
    efficiency = found["t1_ms"] / (ranks * found["tp_ms"])
    remark = {"remark": FASTER} if efficiency > 1 else {}
    return {**row, **found, "efficiency": efficiency, "filled_in_ms": filled, **remark}


def measure_copies(shape, ranks, repetitions):
    """What a rank does besides attention and transfers: packing and unpacking of ulysses, a merge of the ring."""
    plan, heads = SeqPlan.balanced(shape.tokens, ranks), HeadPlan.of(shape.heads, shape.heads, ranks)
    call = Exchange.of((heads,), "qkk", plan, 0, "left out")
    own = shard(shape.draw(), plan, 0)
    lse = [torch.randn(1, shape.heads, plan.lengths[0], device=shape.device) for _ in range(2)]
    exchange_alone = partial(exchange, call, own)

    def time_of(run):
        aligned(shape.device, run, WARM_UP)
        return Timing.of(aligned(shape.device, run, repetitions)).median_ms

    with torch.no_grad():
        exchange_ms, filled = LeftOut(shape.device).measure(lambda: time_of(exchange_alone), repetitions + WARM_UP)
        merge_ms = time_of(lambda: merge_part((own[0], lse[0]), own[1], lse[1], dtype=shape.dtype))
    # q, k, v and the output are written where they leave from or stay, and what came of the output to where it belongs
    moved = 2 * (4 + (ranks - 1) / ranks) * own[0].numel() * own[0].element_size()
    return {"ranks": ranks, "exchange_ms": exchange_ms - filled, "exchange_bytes": moved, "merge_ms": merge_ms}


def compute_rows(parts, size, between_nodes):
    """What this run's numbers give for 8 GPUs of one host, and for 64 of eight, whose link somebody has to have measured."""
    if size < 2 or not parts:
        return []
    # a rank sends 4 N (P - 1) / P elements, N = all tokens / P
    unit = parts["bytes_sent"] * size**2 / (size - 1)
    bandwidth = parts["bytes_sent"] / parts["exchange_ms"]
    alone = parts["attention_ms_of_8"]
    in_node = unit * 7 / 64 / bandwidth
    made_from = {"exchange_GB_per_s": bandwidth * 1e-6, "attention_ms": alone}
    whole = parts["attention_ms_of_1"]
    rows = [{"gpus": 8, "strategy": "ulysses", "efficiency": whole / (8 * (alone + in_node)), "made_from": made_from}]
    if between_nodes:
        # keys and values, half of what ulysses exchanges: a rank's eighth of the heads, seven of eight shards
        ring = unit / 2 * 7 / 64 / (between_nodes * 1e6)
        ms = max(alone / 8, ring) + in_node / 8
        given = {**made_from, "between_nodes_GB_per_s, given": between_nodes}
        rows.append({"gpus": 64, "strategy": "usp", "efficiency": whole / (64 * ms), "made_from": given})
    return rows


def compute_from_shares(shares, shape, bandwidth):
    """What one rank's share and the transfers that nothing hides give, at GB/s that somebody has to have measured."""
    rows = []
    for share in shares if bandwidth else []:
        if "efficiency" not in share or share["strategy"] != "ulysses":
            continue
        ranks, overlap = share["ranks"], share["overlap"]
        # of all groups but one, the way there; of all but one, the way back
        sent = 4 * shape.tokens // ranks * shape.heads * shape.dim * 2 * (ranks - 1) / ranks / overlap
        ms = share["tp_ms"] + sent / (bandwidth * 1e6)
        which = {name: share[name] for name in ("backend", "strategy", "overlap")}
        made_from = {"t1_ms": share["t1_ms"], "tp_ms": share["tp_ms"], "GB_per_s, given": bandwidth}
        efficiency = share["t1_ms"] / (ranks * ms)
        remark = {"remark": FASTER} if efficiency > 1 else {}
        rows.append({"gpus": ranks, **which, "efficiency": efficiency, "made_from": made_from, **remark})
    return rows


def shown(row):
    """Return a measured row, and show it on the first rank."""
    name = f"{row['backend']:20s} {row['strategy']:12s} x{row['overlap']} {row['direction']:18s}"
    if "efficiency" in row:
        note = "  (T1 drifted)" if row["drifted"] else ""
        text = f"T1 {row['t1_ms']:9.3f} ms  TP {row['tp_ms']:9.3f} ms  efficiency {row['efficiency']:.4f}{note}"
    else:
        text = f"{row['gate']}: {row.get('refused', 'it runs')}"
    if dist.get_rank() == 0:
        sys.stdout.write(f"{name} {text}\n")
        sys.stdout.flush()
    return row


def show(found):
    out = sys.stdout.write
    out("".join(f"{name}: {value:.3f}\n" for name, value in found["parts"].items()))
    for name, value in (found["one_rank"] or {}).items():
        out(f"one rank: {name}: {len(value) if isinstance(value, list) else value}\n")
    for row in found["shares_without_transfer"]:
        name = f"{row['backend']:20s} {row['strategy']:8s} x{row['overlap']} of {row['ranks']}, transfers left out"
        if "efficiency" not in row:
            out(f"{name}: {row.get('refused', 'it runs')}\n")
            continue
        speed = f"efficiency {row['efficiency']:.4f}  drift {row['drift']:.4f}" + (
            " (above 1)" if "remark" in row else ""
        )
        out(f"{name}: T1 {row['t1_ms']:.3f} ms  TP {row['tp_ms']:.3f} ms  {speed}\n")
    for row in found["copies"]:
        speed = row["exchange_bytes"] / row["exchange_ms"] * 1e-9
        out(
            f"copies of {row['ranks']}: exchange {row['exchange_ms']:.3f} ms, {speed:.2f} TB/s; merge {row['merge_ms']:.3f} ms\n"
        )
    out("".join(f"computed, not measured: {json.dumps(row)}\n" for row in found["computed"]))


def direct_of_group(sp, device):
    """Whether heads were exchanged by copies from memory that ranks see."""
    return (
        sp.size > 1
        and sp.direct
        and direct_of(dist.distributed_c10d._resolve_process_group(sp.name), device, sp.timeout) is not None
    )


def join(backend, direct):
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return init_sequence_parallel(backend=backend, direct=direct)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny video")
    parser.add_argument(
        "--rehearse", action="store_true", help="run everything on ranks that share a GPU, and time nothing"
    )
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--train", action="store_true", help="forward and backward together, too")
    names = sorted({name for name, _ in STRATEGIES})
    parser.add_argument("--strategies", nargs="+", choices=names, default=names)
    parser.add_argument("--collectives", action="store_true", help="exchange by NCCL alone")
    parser.add_argument("--no-peers", action="store_true", help="without other projects")
    parser.add_argument("--backends", nargs="+", default=["TORCH_SDPA", "FLASH_ATTN", "VIDEO_SPARSE_ATTN", "SLA_ATTN"])
    parser.add_argument(
        "--between-nodes", type=float, help="GB/s per GPU that were measured between hosts, for 64 GPUs"
    )
    parser.add_argument(
        "--between-gpus",
        type=float,
        help="GB/s per GPU that were measured within a host, for what one GPU computes for several",
    )
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    sp = join("nccl" if arguments.device == "cuda" and not arguments.rehearse else "gloo", not arguments.collectives)
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else torch.device("cpu")
    shape = Shape(
        *(QUICK if arguments.quick or arguments.rehearse else WAN),
        torch.bfloat16 if device.type == "cuda" else torch.float32,
        device,
    )
    rows = []
    for backend in arguments.backends:
        strategies = STRATEGIES if backend in DENSE else ULYSSES
        for strategy, overlap in (pair for pair in strategies if pair[0] in arguments.strategies):
            for direction in ("forward", "forward + backward")[: 1 + arguments.train]:
                rows.append(shown(measure_strategy(backend, strategy, overlap, shape, sp, arguments, direction)))
                if sp.size == 1:
                    break
            if sp.size == 1:
                # without other ranks every strategy is the same code
                break
    if sp.size > 1 and not arguments.no_peers:
        rows.append(shown(measure_peer(diffusers_ulysses.version(), make_diffusers, shape, sp, arguments)))
        rows.append(shown(measure_peer("FastVideo's passes", make_fastvideo, shape, sp, arguments)))
    parts = measure_parts(shape, sp, arguments.repetitions)
    if arguments.rehearse:
        parts = {}
    one_rank, shares, copies = None, [], []
    if sp.size == 1:
        one_rank = measure_one_rank(shape)
        for backend in arguments.backends:
            strategies = (*ULYSSES, ("ring", 1)) if backend in DENSE else ULYSSES
            shares += [measure_share(backend, shape, n, *each, arguments) for n in (2, 8) for each in strategies]
        copies = [measure_copies(shape, ranks, arguments.repetitions) for ranks in (2, 8)]
    environment = describe_environment(device, commit=os.environ.get("COMMIT"))
    found = {
        **vars(environment),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else "",
        "ranks": sp.size,
        "rehearsal": arguments.rehearse,
        "direct": direct_of_group(sp, device),
        "shape": {"tokens": shape.tokens, "heads": shape.heads, "head_size": shape.dim, "dtype": str(shape.dtype)},
        "sparsity": SPARSITY,
        "rows": rows,
        "parts": parts,
        "one_rank": one_rank,
        "shares_without_transfer": shares,
        "copies": copies,
        "computed": compute_rows(parts, sp.size, arguments.between_nodes)
        + compute_from_shares(shares, shape, arguments.between_gpus),
    }
    if sp.rank == 0:
        Path(arguments.output).write_text(json.dumps(found, indent=1) + "\n")
        show(found)
        if arguments.plot and not arguments.rehearse:
            plot(found, arguments.plot)


if __name__ == "__main__":
    main()
