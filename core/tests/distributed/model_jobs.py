"""What ranks run around a layer: compilation, autocast, checkpoints, FSDP2; run as "model_jobs.<name>"."""

import torch
import torch.distributed as dist
from jobs import DIM, case, divided, near, shards

from attnmux import DistributedAttention, LocalAttention, SeqPlan
from attnmux.testing import assert_close_to_oracle


def of_strategy(sp, strategy):
    return divided(sp) if strategy == "usp" else sp


def compiled(sp, strategy, trains, overlap):
    """No graph breaks, and after the first few lengths nothing is compiled again, text and shards of any length included."""
    from torch._dynamo import lookup_backend

    sp = of_strategy(sp, strategy)
    options = {
        "sp_group": sp,
        "strategy": strategy,
        "backend": "TORCH_SDPA",
        "dtype": torch.float64,
        "overlap": overlap,
    }
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def check(layer, function, length, text):
        video, words, _, freqs = case(sp.size, length, 2, 5, 5, text)
        plan = SeqPlan.balanced(length, sp.size)

        def run(function):
            mine = shards(video, plan, sp.rank) if trains else [x.detach() for x in shards(video, plan, sp.rank)]
            got, text = function(*mine, None, *words, freqs, plan=plan)
            if trains:
                (got.square().sum() + text.square().sum()).backward()
            return [got.detach(), text.detach(), *(x.grad for x in mine if trains)]

        for which, (x, y) in enumerate(zip(run(function), run(layer), strict=True)):
            near(x, y, f"{strategy}, {length} tokens: result {which}", "gradient")

    layer, counts = DistributedAttention(5, DIM, **options), []
    function = torch.compile(layer, fullgraph=True, backend=count)
    for length, text in ((22, 3), (29, 7), (39, 6))[: 3 if trains else 2]:
        check(layer, function, length, text)
        counts.append(len(graphs))
    if strategy != "ulysses" or overlap > 1:
        return counts
    # the compiler now takes the scale for a variable
    other = DistributedAttention(5, DIM, softmax_scale=0.37, **options)
    check(other, torch.compile(other, fullgraph=True, backend=count), 22, 3)
    return counts


def compiled_order(sp, strategy, heads, overlap):
    """What is sent, waited for and computed in a compiled layer, in order, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    short = {
        "sp_send_heads": "send", "sp_send_shards": "send back", "sp_arrived_shards": "wait back", "wait_tensor": "wait",
        "sp_send_gradients_of_shards": "send", "sp_send_gradients_of_heads": "send back",
        "sp_arrived_gradients_of_heads": "wait back", "sp_shift": "send", "sp_taken": "wait",
    }  # fmt: skip
    logs = []

    def record(graph, inputs):
        names = [getattr(node.target, "_opname", "") for node in graph.graph.nodes]
        logs.append([short.get(name, "attend") for name in names if name in short or "attention" in name])
        nodes = {
            name: [node for node in graph.graph.nodes if getattr(node.target, "_opname", "") == name] for name in short
        }
        for end in nodes["sp_arrived_shards"]:
            # their memory must not be taken for anything else until they have been sent
            assert list(end.args[1]) == [node.args[0] for node in nodes["sp_send_shards"]]
        return graph

    torch.compiler.reset()
    options = {"backend": "TORCH_SDPA", "dtype": torch.float32, "strategy": strategy, "overlap": overlap}
    layer = DistributedAttention(heads, DIM, sp_group=sp, **options)
    # inputs that backward knows too, as it does those of a projection: from them it could send again
    function = torch.compile(
        lambda *x: layer(*(y * y for y in x)), fullgraph=True, backend=aot_autograd(fw_compiler=record)
    )
    function(*[torch.randn(1, 6, heads, DIM, requires_grad=True) for _ in range(3)])[0].sum().backward()
    return logs


def autocast(sp, strategy):
    """Under autocast a layer gives the dtype and, within the rule, the values that LocalAttention gives to bfloat16 inputs."""
    sp = of_strategy(sp, strategy)
    video, _, _, _ = case(sp.size, 12, 1, 4, 4, 0)
    plan = SeqPlan.balanced(12, sp.size)
    first, last = plan.range_of(sp.rank)
    options = {"backend": "TORCH_SDPA", "dtype": torch.bfloat16}
    layer = DistributedAttention(4, DIM, sp_group=sp, strategy=strategy, **options)
    halves = [x.bfloat16() for x in video]
    exact = LocalAttention(4, DIM, backend="TORCH_SDPA", dtype=torch.float64)(*[x.double() for x in halves])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = LocalAttention(4, DIM, **options)(*halves)
        mine = [x[:, first:last].clone().requires_grad_() for x in halves]
        got, _ = layer(*mine)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close_to_oracle(got, exact[:, first:last], want[:, first:last], what=strategy)
    got.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in mine)
    # an input that autocast would round comes out in the dtype it had
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return str(layer(*[x[:, first:last].float() for x in halves])[0].dtype)


def checkpointed(sp, strategy, overlap):
    from torch.utils.checkpoint import checkpoint

    sp = of_strategy(sp, strategy)
    video, _, _, _ = case(sp.size, 8, 1, 4, 4, 0)
    plan = SeqPlan.balanced(8, sp.size)
    options = {"backend": "TORCH_SDPA", "dtype": torch.float64, "overlap": overlap}
    layer = DistributedAttention(4, DIM, sp_group=sp, strategy=strategy, **options)

    def run(function):
        mine = shards(video, plan, sp.rank)
        function(*mine)[0].square().sum().backward()
        return [x.grad for x in mine]

    for a, b in zip(run(lambda *x: checkpoint(layer, *x, use_reentrant=False)), run(layer), strict=True):
        assert torch.equal(a, b)


class Block(torch.nn.Module):
    """A transformer's attention: projections around a layer, whose backend may have parameters of its own."""

    def __init__(self, layer, heads, dim):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.qkv, self.out = (torch.nn.Linear(heads * dim, n * heads * dim) for n in (3, 1))

    def forward(self, x, **options):
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        output = self.layer(q, k, v, **options)
        output = output[0] if isinstance(output, tuple) else output
        return x + self.out(output.flatten(2))


def fully_sharded(sp, strategy, backend, overlap):
    """FSDP2 on the mesh of the sequence: its mean over ranks is the gradient of the mean of the losses."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    heads, dim, length = 4, 16, 130
    options = {"backend": backend, "dtype": torch.float32}
    if backend == "SLA_ATTN":
        options.update(topk_ratio=0.5, BLKQ=64, BLKK=64)
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "sp"))
    sample, size = mesh["dp"].get_local_rank(), 2

    def filled(block):
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in sorted(block.named_parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        return block

    generator = torch.Generator().manual_seed(6)
    x, weight = (torch.randn(mesh["dp"].size(), length, heads * dim, generator=generator) for _ in range(2))

    def reference(dtype):
        block = filled(Block(LocalAttention(heads, dim, **{**options, "dtype": dtype}), heads, dim)).to(dtype)
        # every rank's loss is that of its tokens
        ((block(x.to(dtype)) * weight.to(dtype)).sum() / dist.get_world_size()).backward()
        return {name: parameter.grad for name, parameter in block.named_parameters()}

    layer = DistributedAttention(heads, dim, sp_group=mesh["sp"], strategy=strategy, overlap=overlap, **options)
    block = filled(Block(layer, heads, dim))
    fully_shard(block, mesh=mesh._flatten("all") if mesh["dp"].size() > 1 else mesh["sp"])
    plan = SeqPlan.balanced(length, size)
    first, last = plan.range_of(mesh["sp"].get_local_rank())
    output = block(x[sample : sample + 1, first:last], plan=plan)
    (output * weight[sample : sample + 1, first:last]).sum().backward()
    found = {name: parameter.grad.full_tensor() for name, parameter in block.named_parameters()}
    oracle, baseline = reference(torch.float64), reference(torch.float32)
    assert found.keys() == oracle.keys()
    for name, gradient in found.items():
        assert_close_to_oracle(gradient, oracle[name].double(), baseline[name], kind="gradient", what=name)


def copied_elements(sp, overlap):
    """What the exchanges copy besides sending: elements read and written over those of a local q, and concatenations."""
    from torch.profiler import ProfilerActivity, profile

    layer = DistributedAttention(4, DIM, sp_group=sp, backend="TORCH_SDPA", dtype=torch.float32, overlap=overlap)
    mine = [torch.randn(1, 16, 4, DIM, requires_grad=True) for _ in range(3)]
    weight = torch.randn(1, 16, 4, DIM)
    layer(*mine)[0].backward(weight)

    def count(run):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            result = run()
        copies = [event.input_shapes[0] for event in found.events() if event.name == "aten::copy_"]
        joined = sum(event.name == "aten::cat" for event in found.events())
        # they are in words of four elements
        return 2 * 4 * sum(torch.Size(shape).numel() for shape in copies) / mine[0].numel(), joined, result

    forward, joined, output = count(lambda: layer(*mine)[0])
    for x in mine:
        x.grad = None
    backward, joined_backward, _ = count(lambda: output.backward(weight))
    return forward, joined, backward, joined_backward
