"""What the ranks of a pool run on GPUs, in bfloat16 against float64 in one process."""

import torch
import torch.distributed as dist

from attnmux import DistributedAttention, SeqPlan, SPGroup
from attnmux.distributed.collective import describe
from attnmux.distributed.exchange import Exchange, arrived_heads, arrived_shards, send_heads, send_shards
from attnmux.distributed.gather import gather_keys
from attnmux.distributed.plan import HeadPlan
from attnmux.distributed.ring import Ring, ring_attention
from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, dense_attention_oracle

DIM = 64


def strategy(sp, name, backend, causal, text, overlap):
    """Output and gradients of a strategy obey the error rule."""
    length, heads, kv_heads = 301, 8, 4
    generator = torch.Generator("cuda").manual_seed(0)

    def make(rows, n):
        x = torch.randn(2, rows, n, DIM, generator=generator, device="cuda")
        return x.to(torch.bfloat16)

    tensors = [make(length + text, n) for n in (heads, kv_heads, kv_heads)]
    weight = make(length + text, heads)
    # the ranks' weights of the text add up to a number that bfloat16 holds
    found_weight = weight.clone()
    found_weight[:, length:] = weight[:, length:] if sp.rank == 0 else 0

    def run(function, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in tensors]
        output = function(*leaves, causal=causal)
        output.backward(weight.to(output.dtype))
        return [output.detach(), *(x.grad for x in leaves)]

    oracle, baseline = run(dense_attention_oracle, torch.float64), run(dense_attention_baseline, torch.bfloat16)
    plan = SeqPlan.balanced(length, sp.size)
    first, last = plan.range_of(sp.rank)
    mine = [x[:, first:last].clone().requires_grad_() for x in tensors]
    words = [x[:, length:].clone().requires_grad_() for x in tensors] if text else []
    layer = DistributedAttention(
        heads,
        DIM,
        kv_heads,
        causal=causal,
        backend=backend,
        dtype=torch.bfloat16,
        sp_group=sp,
        strategy=name,
        overlap=overlap,
    )
    output, tail = layer(*mine, None, *words, plan=plan)
    loss = (output * weight[:, first:last]).sum()
    if text:
        loss = loss + (tail * found_weight[:, length:]).sum()
    loss.backward()
    torch.cuda.synchronize()

    def near(x, which, rows, what):
        kind = "gradient" if which else "output"
        assert_close_to_oracle(x, oracle[which][:, rows], baseline[which][:, rows], kind=kind, what=what)

    own, rest = slice(first, last), slice(length, None)
    for which, x in enumerate([output, *(x.grad for x in mine)]):
        near(x, which, own, f"{name}: {('output', 'gradient of q', 'gradient of k', 'gradient of v')[which]}")
    if text:
        near(tail, 0, rest, f"{name}: text")
        for which, x in enumerate(words, start=1):
            total = x.grad.float()
            dist.all_reduce(total)
            near(total.to(x.dtype), which, rest, f"{name}: gradient of text {which}")


def sparse(sp, backend, overlap):
    """Backends that work head by head give the bits of one process, and their gradients if they have any, of strided views."""
    from attnmux import LocalAttention

    grid, heads = (8, 8, 9), 3
    length, options, metadata = grid[0] * grid[1] * grid[2], {"backend": backend, "dtype": torch.bfloat16}, None
    if backend == "VIDEO_SPARSE_ATTN":
        from attnmux_vsa.backend import VideoSparseAttentionMetadataBuilder

        metadata = VideoSparseAttentionMetadataBuilder().build(0, grid, (1, 1, 1), 0.5, device=torch.device("cuda"))
    elif backend == "BLOCK_SPARSE_ATTN":
        from attnmux_blocksparse import BlockIndex
        from attnmux_blocksparse.backend import BlockSparseAttentionMetadata

        mask = torch.rand(heads, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.5
        metadata = BlockSparseAttentionMetadata(0, BlockIndex.from_block_mask(mask.cuda(), block_q=64, block_k=64))
    elif backend == "VMOBA_ATTN":
        from attnmux_vmoba.backend import VMOBAAttentionMetadataBuilder

        options["layer_idx"] = 0
        metadata = VMOBAAttentionMetadataBuilder().build(
            0, grid, (1, 1, 1), temporal_chunk_size=2, temporal_topk=2, spatial_chunk_size=(4, 3), spatial_topk=3,
            st_chunk_size=(4, 4, 3), st_topk=3, device="cuda",
        )  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(1, length, heads, DIM, generator=generator, device="cuda").bfloat16() for _ in range(4)]
    plan = SeqPlan.balanced(length, sp.size)
    own = slice(*plan.range_of(sp.rank))

    def run(layer, rows, **inputs):
        trains = layer.selection.spec.capabilities.backward
        leaves = [x[:, rows].clone().requires_grad_(trains) for x in tensors[:3]]
        output = layer.cuda()(*leaves, attn_metadata=metadata, **inputs)
        output = output[0] if isinstance(output, tuple) else output
        if trains:
            output.backward(tensors[3][:, rows])
        return [output.detach(), *(x.grad for x in leaves if trains)]

    found = run(DistributedAttention(heads, DIM, sp_group=sp, overlap=overlap, **options), own, plan=plan)
    for which, (x, y) in enumerate(zip(found, run(LocalAttention(heads, DIM, **options), slice(None)), strict=True)):
        assert torch.equal(x, y[:, own]), f"{backend}: other bits in {which}"


def one_rank(sp):
    """The exchanges run over NCCL, and in a CUDA graph, with a single rank, which a layer would do without."""
    assert dist.get_backend() == "nccl"
    plan, of = SeqPlan.balanced(9, 1), HeadPlan.of(4, 2, 1)
    q, k, v = (torch.randn(2, 9, n, DIM, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
    settings = describe(SPGroup.from_group(dist.group.WORLD, timeout=5.0), {"case": "one rank"})
    layer = DistributedAttention(4, DIM, 2, backend="TORCH_SDPA", dtype=torch.bfloat16, sp_group=SPGroup.local())
    ring = Ring(layer.attn_impl, layer.attn_impl, 0, 1)
    # two groups of heads: what is under way is on a stream of NCCL's
    exchange = Exchange.of(of.groups(2), "qkk", plan, 0, settings)

    def run():
        back, sent = [], []
        for group, under_way in enumerate(send_heads(exchange, [q, k, v], [])):
            x, y, z = arrived_heads(exchange, group, under_way, 2, DIM)
            y, z = gather_keys(y, z, [], (9,), 0, settings)
            sent.append(ring_attention(x, y, z, ring, None, (9,), settings))
            back.append(send_shards(exchange, group, sent[-1]))
        return arrived_shards(exchange, back, sent)[0]

    with torch.no_grad():
        want = layer(q, k, v)[0]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                assert torch.equal(run(), want)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, layer(q, k, v)[0])


def captured(sp, name, overlap):
    """A layer over several GPUs in a CUDA graph gives the bits it gives without."""
    q, k, v = (torch.randn(1, 96, 4, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options = {"backend": "TORCH_SDPA", "dtype": torch.bfloat16, "strategy": name, "overlap": overlap}
    layer = DistributedAttention(4, DIM, sp_group=sp, **options)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(q, k, v)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, _ = layer(q, k, v)
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, layer(q, k, v)[0])


def compiled(sp, name, overlap):
    """Inductor gives what eager does, within the rule for another order of operations."""
    tensors = [torch.randn(1, 96, 4, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    options = {"backend": "TORCH_SDPA", "dtype": torch.bfloat16, "strategy": name, "overlap": overlap}
    layer = DistributedAttention(4, DIM, sp_group=sp, **options)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in tensors]
        output, _ = function(*leaves)
        output.backward(torch.ones_like(output))
        return [output.detach(), *(x.grad for x in leaves)]

    for which, (x, y) in enumerate(zip(run(torch.compile(layer, fullgraph=True)), run(layer), strict=True)):
        assert_close_to_oracle(x, y.double(), y, kind="gradient" if which else "output", what=f"{name} {which}")


def left_alone(sp):
    """A rank whose neighbour dies fails within the timeout of the group; returns after how long, and what a next call says."""
    import datetime
    import os
    import time

    group = SPGroup.from_group(dist.new_group(timeout=datetime.timedelta(seconds=2)), timeout=2.0)
    layer = DistributedAttention(4, DIM, backend="TORCH_SDPA", dtype=torch.bfloat16, sp_group=group)
    mine = [torch.randn(1, 9, 4, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    layer(*mine)
    torch.cuda.synchronize()
    if sp.rank == 1:
        os._exit(0)
    layer(*mine)
    started = time.monotonic()
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        waited = time.monotonic() - started
    try:
        layer(*mine)
    except RuntimeError as error:
        return waited, str(error)
    raise AssertionError("no error")
