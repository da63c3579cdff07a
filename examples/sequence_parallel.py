"""One sequence on several ranks: forward and backward, against the same attention in one process.

    torchrun --standalone --nproc-per-node 2 examples/sequence_parallel.py                 # two processes on a CPU, gloo
    torchrun --standalone --nproc-per-node 2 examples/sequence_parallel.py --device cuda   # one GPU each, NCCL

Every rank makes the same sequence and keeps its shard, so that the result can be compared. It prints what the first rank
sent and how far output and gradients are from those of LocalAttention, and fails where that is more than rounding.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from attnmux import DistributedAttention, LocalAttention, SeqPlan, init_sequence_parallel
from attnmux.distributed import count_traffic
from attnmux.testing import assert_close_to_oracle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=1001, help="need not be a multiple of the ranks")
    parser.add_argument("--text", type=int, default=7, help="tokens that every rank holds")
    parser.add_argument("--heads", type=int, default=5, help="need not be a multiple of the ranks")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--strategy", choices=["ulysses", "ring", "allgather_kv"], default="ulysses")
    parser.add_argument(
        "--overlap", type=int, default=1, help="groups of heads that ulysses exchanges one after the other"
    )
    arguments = parser.parse_args()

    sp = init_sequence_parallel(backend="nccl" if arguments.device == "cuda" else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else torch.device("cpu")

    generator = torch.Generator().manual_seed(0)

    def make(rows: int) -> torch.Tensor:
        shape = (1, rows, arguments.heads, arguments.head_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).float().to(device)

    video, text = [make(arguments.tokens) for _ in range(3)], [make(arguments.text) for _ in range(3)]
    weight = make(arguments.tokens)

    # the model: the default group is the one of init_sequence_parallel
    options = {"strategy": arguments.strategy, "overlap": arguments.overlap}
    attention = DistributedAttention(arguments.heads, arguments.head_size, backend="TORCH_SDPA", **options)
    plan = SeqPlan.balanced(arguments.tokens, sp.size)
    first, last = plan.range_of(sp.rank)
    shard = [x[:, first:last].clone().requires_grad_() for x in video]
    with count_traffic() as traffic:
        output, _ = attention(*shard, None, *text, plan=plan)
        (output * weight[:, first:last]).sum().backward()

    # the same in one process, in this precision and in float64
    def whole(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in video]
        joined = [torch.cat((x, tail.to(dtype)), dim=1) for x, tail in zip(leaves, text, strict=True)]
        layer = LocalAttention(arguments.heads, arguments.head_size, backend="TORCH_SDPA", dtype=dtype)
        result = layer(*joined)[:, : arguments.tokens]
        (result * weight.to(dtype)).sum().backward()
        return [x[:, first:last] for x in (result.detach(), *(leaf.grad for leaf in leaves))]

    found = [output, *(x.grad for x in shard)]
    names = ["output", "gradient of q", "gradient of k", "gradient of v"]
    errors = []
    for name, x, oracle, baseline in zip(names, found, whole(torch.float64), whole(torch.float32), strict=True):
        assert_close_to_oracle(x, oracle, baseline, kind="output" if name == "output" else "gradient", what=name)
        errors.append((x.double() - oracle).abs().max())
    largest = torch.stack(errors)
    dist.all_reduce(largest, dist.ReduceOp.MAX)

    if sp.rank == 0:
        print(
            f"{sp.size} ranks, {dist.get_backend()}: {arguments.tokens} tokens as {plan.lengths}, {arguments.heads} heads"
        )
        print(f"rank 0 sent {traffic.bytes_sent} bytes in {traffic.collectives} collectives, forward and backward")
        for name, error in zip(names, largest.tolist(), strict=True):
            print(f"{name}: at most {error:.1e} from float64 in one process")


if __name__ == "__main__":
    main()
