"""What the ranks of a pool run. Most compare with LocalAttention on the whole sequence and raise where they differ."""

import datetime
import os
import time

import torch
import torch.distributed as dist

from attnmux import (
    DistributedAttention,
    DistributedAttention_VSA,
    LocalAttention,
    SeqPlan,
    SequenceParallelError,
    SPGroup,
    UnsupportedRequestError,
    init_sequence_parallel,
    use_sp,
)
from attnmux.distributed.collective import count_traffic, describe
from attnmux.distributed.exchange import Exchange, arrived_heads, arrived_shards, send_heads, send_shards
from attnmux.distributed.plan import HeadPlan
from attnmux.rotary import apply_rotary
from attnmux.testing import assert_close_to_oracle

DIM = 8
REPLICATED = ("replicated_q", "replicated_k", "replicated_v")


def case(size, length, batch, heads, kv_heads, text, dim=DIM):
    generator = torch.Generator().manual_seed(0)

    def make(rows, n):
        return torch.randn(batch, rows, n, dim, generator=generator, dtype=torch.float64)

    video = [make(length, n) for n in (heads, kv_heads, kv_heads)]
    words = [make(text, n) for n in (heads, kv_heads, kv_heads)] if text else []
    # one weight of the sequence's output; every rank weighs the text differently
    weights = make(length, heads), [make(text, heads) for _ in range(size)]
    angles = torch.randn(length, dim // 2, generator=generator, dtype=torch.float64)
    return video, words, weights, (angles.cos(), angles.sin())


def near(found, want, what, kind="output"):
    assert_close_to_oracle(found, want, want, kind=kind, what=what)


def shards(tensors, plan, rank, *, strided=False):
    """This rank's rows of each as leaves; what lies in rows of padding must not matter."""
    first, last = plan.range_of(rank)
    padding = plan.rows[rank] - (last - first)
    parts = [torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, padding), value=7.0) for x in tensors]
    if strided:
        parts = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
    return [x.clone().requires_grad_() for x in parts]


def whole(layer, video, words, freqs):
    """What the layer gives for the sequence and the text behind it, in one process."""
    q, k, v = video
    if freqs is not None:
        q, k = apply_rotary(q, freqs), apply_rotary(k, freqs)
    length = q.shape[1]
    if words:
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), words, strict=True))
    output = layer(q, k, v)
    return output[:, :length], output[:, length:]


_divided = {}


def divided(sp):
    """The ranks as two that go around times two that exchange heads; made once, as torch keeps groups."""
    if sp not in _divided:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (sp.size // 2, 2), mesh_dim_names=("ring", "ulysses"))
        _divided[sp] = SPGroup.from_mesh(mesh, timeout=sp.timeout)
    return _divided[sp]


def compare(sp, length, batch, heads, kv_heads, text, rotary, padded, causal=False, strategy="ulysses", overlap=1):
    plan = SeqPlan.padded(length, -(-length // sp.size) + 1, sp.size) if padded else SeqPlan.balanced(length, sp.size)
    arguments = {"num_kv_heads": kv_heads, "causal": causal, "strategy": strategy, "overlap": overlap}
    return compare_shards(sp, plan, batch, heads, text, rotary, original_seq_len=padded, **arguments)


def any_shards(sp, lengths, rows, heads, kv_heads, text, strategy, causal):
    plan = SeqPlan(lengths, rows)
    compare_shards(sp, plan, 2, heads, text, False, num_kv_heads=kv_heads, strategy=strategy, causal=causal)


def scaled(sp, scale):
    for strategy in ("ulysses", "ring", "allgather_kv"):
        options = {"num_kv_heads": 2, "strategy": strategy, "softmax_scale": scale}
        compare_shards(sp, SeqPlan.balanced(9, sp.size), 1, 4, 1, False, **options)


def compare_shards(
    sp, plan, batch, heads, text, rotary, *, strategy, num_kv_heads, original_seq_len=False, overlap=1, **options
):
    """Outputs and gradients of q, k, v and text against LocalAttention; returns what was sent."""
    if strategy == "usp" and sp.size > 1:
        sp = divided(sp)
    video, words, (weight, text_weights), freqs = case(sp.size, plan.length, batch, heads, num_kv_heads, text)
    freqs = freqs if rotary else None
    arguments = {"num_kv_heads": num_kv_heads, "backend": "TORCH_SDPA", "dtype": torch.float64, **options}
    leaves = [x.clone().requires_grad_() for x in video]
    word_leaves = [x.clone().requires_grad_() for x in words]
    want, want_text = whole(LocalAttention(heads, DIM, **arguments), leaves, word_leaves, freqs)
    ((want * weight).sum() + sum((want_text * w).sum() for w in text_weights)).backward()

    first, last = plan.range_of(sp.rank)
    count = last - first
    mine = shards(video, plan, sp.rank, strided=batch == 2)
    my_words = [x.clone().requires_grad_() for x in words]
    layer = DistributedAttention(heads, DIM, sp_group=sp, strategy=strategy, overlap=overlap, **arguments)
    inputs = {"original_seq_len": plan.length} if original_seq_len else {"plan": plan}
    if text:
        inputs.update(zip(REPLICATED, my_words, strict=True))
    with count_traffic() as forward:
        got, got_text = layer(*mine, freqs_cis=freqs, **inputs)
    loss = (got[:, :count] * weight[:, first:last]).sum()
    if text:
        loss = loss + (got_text * text_weights[sp.rank]).sum()
    with count_traffic() as backward:
        loss.backward()

    near(got[:, :count], want[:, first:last], "output")
    assert not got[:, count:].any(), "rows of padding are not zero"
    for name, x, y in zip("qkv", mine, leaves, strict=True):
        near(x.grad[:, :count], y.grad[:, first:last], f"gradient of {name}", "gradient")
        assert not x.grad[:, count:].any(), f"rows of padding have a gradient of {name}"
    if text:
        near(got_text, want_text, "text")
        for name, x, y in zip("qkv", my_words, word_leaves, strict=True):
            # each rank has the gradient of its heads, or of its tokens
            total = x.grad.clone()
            if sp.size > 1:
                dist.all_reduce(total)
            near(total, y.grad, f"gradient of text {name}", "gradient")
    else:
        assert got_text is None
    return forward.collectives, forward.elements_sent, backward.collectives, backward.elements_sent


def there_and_back(sp, lengths, rows, batch, heads, kv_heads, text, groups):
    """The exchange alone: the right heads of every token arrive, and what goes back is what was there."""
    plan, of = SeqPlan(lengths, rows), HeadPlan.of(heads, kv_heads, sp.size)
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(batch, plan.length, n, 2, generator=generator) for n in (heads, kv_heads)]
    words = [torch.randn(batch, text, n, 2, generator=generator) for n in (heads, kv_heads)] if text else []
    settings = describe(sp, {"case": (lengths, rows, batch, heads, kv_heads, text, groups)})
    mine = [x.detach() for x in shards(tensors, plan, sp.rank)]
    parts = of.groups(groups)
    exchange = Exchange.of(parts, "qk", plan, sp.rank, settings, text=text)
    back, sent = [], []
    for group, under_way in enumerate(send_heads(exchange, mine, words)):
        found = arrived_heads(exchange, group, under_way, batch, 2)
        for x, ranges, which in zip(found, (parts[group].q, parts[group].kv), range(2), strict=True):
            first, last = ranges[sp.rank]
            want = tensors[which][:, :, first:last]
            assert torch.equal(x, torch.cat((want, words[which][:, :, first:last]), 1) if text else want)
        sent.append(found[0])
        back.append(send_shards(exchange, group, found[0]))
    shard, tail = arrived_shards(exchange, back, sent)
    first, last = plan.range_of(sp.rank)
    assert torch.equal(shard[:, : last - first], tensors[0][:, first:last])
    assert not shard[:, last - first :].any()
    assert torch.equal(tail, words[0]) if text else tail.shape[1] == 0


def operators(sp):
    """The custom operators pass torch's own checks."""
    plan, of = SeqPlan((2,) * sp.size, (3,) * sp.size), HeadPlan.of(4, 4, sp.size)
    exchange = Exchange.of((of,), "qk", plan, sp.rank, describe(sp, {"case": "opcheck"}), text=1)
    heads, of_shards = (exchange.of_group(ranges, 0) for ranges in (exchange.heads, exchange.shard_heads))
    every_head, every_shard = (exchange.of_all(ranges) for ranges in (exchange.heads, exchange.shard_heads))

    def make(*shape):
        return torch.randn(shape, dtype=torch.float64)

    check, names = torch.library.opcheck, torch.ops.attnmux
    tokens, own = plan.length + 1, 4 // sp.size
    flat = make(2 * 4 * (2 * 2 * 4 + 2 * own))
    check(names.sp_send_heads.default, ([make(2, 3, 4, 4)] * 2, [make(2, 1, 4, 4)] * 2, *heads))
    check(names.sp_send_gradients_of_heads.default, ([make(2, tokens, own, 4)] * 2, 1, *heads))
    check(names.sp_arrived_gradients_of_heads.default, ([flat], [4, 4], 3, 1, 2, 4, *every_head))
    x, flat = make(2, tokens, own, 4), make(2 * 4 * 3 * 4)
    check(names.sp_send_shards.default, (x, *of_shards))
    check(names.sp_arrived_shards.default, ([flat], [x], *every_shard))
    check(names.sp_send_gradients_of_shards.default, (make(2, 3, 4, 4), make(2, 1, 4, 4), *of_shards))
    check(names.sp_taken.default, (flat, [x], "opcheck", exchange.settings[0]))
    rest = (tokens, 2, own, 4, list(plan.lengths), exchange.settings[0])
    check(names.sp_arrived_gradient_with_text.default, (flat, *rest))


def one_rank(sp, strategy):
    """The same bits as LocalAttention by the same operations, forward and backward: no copy and no launch more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    video, _, (weight, _), freqs = case(1, 7, 2, 4, 2, 0)
    arguments = {"num_kv_heads": 2, "backend": "TORCH_SDPA", "dtype": torch.float64}

    def run(layer, *options):
        leaves, recorder = [x.clone().requires_grad_() for x in video], Recorder()
        recorder.names = []
        with recorder:
            output = layer(*leaves, *options)
            output, text = output if isinstance(output, tuple) else (output, None)
            assert text is None
            output.backward(weight)
        return recorder.names, [output, *(x.grad for x in leaves)]

    names, want = run(LocalAttention(4, DIM, **arguments), freqs)
    own_names, got = run(DistributedAttention(4, DIM, sp_group=sp, strategy=strategy, **arguments), *[None] * 4, freqs)
    assert own_names == names
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def compiled(sp):
    video, words, _, freqs = case(sp.size, 9, 2, 5, 5, 3)
    plan = SeqPlan.balanced(9, sp.size)
    layer = DistributedAttention(5, DIM, sp_group=sp, backend="TORCH_SDPA", dtype=torch.float64)

    def run(function):
        mine = shards(video, plan, sp.rank)
        got, text = function(*mine, None, *words, freqs, plan=plan)
        (got.square().sum() + text.square().sum()).backward()
        return [got, text, *(x.grad for x in mine)]

    found = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for i, (a, b) in enumerate(zip(found, run(layer), strict=True)):
        near(a, b, f"result {i}", "gradient")


class Scaled(torch.nn.Module):
    """An impl with a parameter."""

    def __init__(self, impl):
        super().__init__()
        self.impl, self.causal, self.softmax_scale = impl, impl.causal, impl.softmax_scale
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 2.0, DIM, dtype=torch.float64))

    def forward(self, query, key, value, attn_metadata):
        return self.impl.forward(query, key * self.weight, value, attn_metadata)


def parameter(sp):
    """Over the ranks the mean of a parameter's gradients is the gradient of the mean of the losses."""
    video, _, (weight, _), _ = case(sp.size, 7, 1, 5, 5, 0)
    options = {"backend": "TORCH_SDPA", "dtype": torch.float64}
    plan = SeqPlan.balanced(7, sp.size)
    first, last = plan.range_of(sp.rank)
    local, layer = LocalAttention(5, DIM, **options), DistributedAttention(5, DIM, sp_group=sp, **options)
    for each in (local, layer):
        impl = each.attn_impl
        del each.attn_impl
        each.attn_impl = Scaled(impl)
    # a rank's loss is that of its tokens, so that the sum over the ranks is the loss of the sequence
    ((local(*video) * weight).sum() / sp.size).backward()
    (layer(*shards(video, plan, sp.rank), plan=plan)[0] * weight[:, first:last]).sum().backward()
    mean = layer.attn_impl.weight.grad.clone()
    if sp.size > 1:
        dist.all_reduce(mean)
    near(mean / sp.size, local.attn_impl.weight.grad, "gradient of the parameter", "gradient")


def gradient_of_one(sp, strategy):
    """Gradients are asked for of k alone, and in inference mode of nothing."""
    video, _, _, _ = case(sp.size, 8, 1, 4, 4, 0)
    plan = SeqPlan.balanced(8, sp.size)
    layer = DistributedAttention(4, DIM, sp_group=sp, strategy=strategy, backend="TORCH_SDPA", dtype=torch.float64)
    all_three = shards(video, plan, sp.rank)
    want, _ = layer(*all_three)
    want.square().sum().backward()
    q, k, v = (x.detach().clone() for x in all_three)
    got, _ = layer(q, k.requires_grad_(), v)
    got.square().sum().backward()
    assert torch.equal(k.grad, all_three[1].grad)
    assert q.grad is None
    assert v.grad is None
    with torch.inference_mode():
        assert torch.equal(layer(q, k, v)[0], want)


def video_sparse(sp, gated, overlap):
    from attnmux_vsa.backend import VideoSparseAttentionMetadataBuilder

    grid = (7, 5, 3)
    rows = 7 * 5 * 3
    video, _, (weight, _), freqs = case(sp.size, rows, 1, 4, 4, 0)
    tensors = [*video, video[0].flip(1)] if gated else video
    metadata = VideoSparseAttentionMetadataBuilder().build(0, grid, (1, 1, 1), 0.5)
    options = {"backend": "VIDEO_SPARSE_ATTN", "dtype": torch.float64}
    plan = SeqPlan.balanced(rows, sp.size)
    first, last = plan.range_of(sp.rank)
    leaves = [x.clone().requires_grad_() for x in tensors]
    gate = leaves[3] if gated else None
    want = LocalAttention(4, DIM, **options)(*leaves[:3], freqs, attn_metadata=metadata, gate_compress=gate)
    (want * weight).sum().backward()
    mine = shards(tensors, plan, sp.rank)
    layer = DistributedAttention_VSA(4, DIM, sp_group=sp, overlap=overlap, **options)
    my_gate = mine[3] if gated else None
    with count_traffic() as traffic:
        got, text = layer(*mine[:3], None, gate_compress=my_gate, freqs_cis=freqs, attn_metadata=metadata, plan=plan)
    (got * weight[:, first:last]).sum().backward()
    assert text is None
    # which tiles are kept is decided per head, on the whole sequence
    assert torch.equal(got, want[:, first:last])
    for name, x, y in zip(("q", "k", "v", "gate"), mine, leaves, strict=False):
        near(x.grad, y.grad[:, first:last], f"gradient of {name}", "gradient")
    return traffic.collectives, traffic.elements_sent


def listed_blocks(sp, shared, text, overlap):
    """BLOCK_SPARSE_ATTN: every rank is given all heads' lists, over the sequence and the text behind it."""
    from attnmux_blocksparse import BlockIndex
    from attnmux_blocksparse.backend import BlockSparseAttentionMetadata

    length, heads, kv_heads, dim = 300, 6, 3, 16
    video, words, (weight, _), _ = case(sp.size, length, 2, heads, kv_heads, text, dim)
    blocks = -(-(length + text) // 64)
    mask = torch.rand(1 if shared else heads, blocks, blocks, generator=torch.Generator().manual_seed(3)) < 0.5
    metadata = BlockSparseAttentionMetadata(0, BlockIndex.from_block_mask(mask, block_q=64, block_k=64))
    options = {"num_kv_heads": kv_heads, "backend": "BLOCK_SPARSE_ATTN", "dtype": torch.float64}
    leaves, plan = [x.clone().requires_grad_() for x in video], SeqPlan.balanced(length, sp.size)
    first, last = plan.range_of(sp.rank)
    joined = [torch.cat(pair, dim=1) for pair in zip(leaves, words, strict=True)] if text else leaves
    want = LocalAttention(heads, dim, **options)(*joined, attn_metadata=metadata)
    (want[:, :length] * weight).sum().backward()
    mine = shards(video, plan, sp.rank)
    layer = DistributedAttention(heads, dim, sp_group=sp, overlap=overlap, **options)
    got, got_text = layer(*mine, None, *words, plan=plan, attn_metadata=metadata)
    (got * weight[:, first:last]).sum().backward()
    near(got, want[:, first:last], "output")
    if text:
        near(got_text, want[:, length:], "text")
    for name, x, y in zip("qkv", mine, leaves, strict=True):
        near(x.grad, y.grad[:, first:last], f"gradient of {name}", "gradient")
    few = BlockSparseAttentionMetadata(
        0, BlockIndex.from_block_mask(mask.new_ones(2, blocks, blocks), block_q=64, block_k=64)
    )
    try:
        layer(*mine, None, *words, plan=plan, attn_metadata=few)
    except UnsupportedRequestError as error:
        return str(error)
    raise AssertionError("lists for two heads of six are taken")


def sparse_linear(sp, overlap):
    """SLA: outputs and gradients match; those of its projection add up over the ranks."""
    video, _, (weight, _), _ = case(sp.size, 200, 1, 4, 4, 0, dim=16)
    options = {"backend": "SLA_ATTN", "dtype": torch.float64, "topk_ratio": 0.5, "BLKQ": 64, "BLKK": 64}
    plan = SeqPlan.balanced(200, sp.size)
    first, last = plan.range_of(sp.rank)
    local = LocalAttention(4, 16, **options)
    layer = DistributedAttention(4, 16, sp_group=sp, overlap=overlap, **options)
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in local.named_parameters()]
    for each in (local, layer):
        torch.nn.init.normal_(each.attn_impl.proj_l.weight, generator=torch.Generator().manual_seed(1))
    leaves, mine = [x.clone().requires_grad_() for x in video], shards(video, plan, sp.rank)
    want, (got, _) = local(*leaves), layer(*mine, plan=plan)
    near(got, want[:, first:last], "output")
    (want * weight).sum().backward()
    (got * weight[:, first:last]).sum().backward()
    for name, x, y in zip("qkv", mine, leaves, strict=True):
        near(x.grad, y.grad[:, first:last], f"gradient of {name}", "gradient")
    total = layer.attn_impl.proj_l.weight.grad.clone()
    if sp.size > 1:
        dist.all_reduce(total)
    wanted = local.attn_impl.proj_l.weight.grad
    # the parameter and its gradient are float32
    assert_close_to_oracle(total, wanted.double(), wanted, kind="gradient", what="gradient of proj_l")


def quantised(sp, backend, overlap):
    """Sage: every head has its own scales, so that the output has the same bits on any number of ranks."""
    video, _, _, _ = case(sp.size, 200, 1, 4, 4, 0, dim=16)
    video = [x.float() for x in video]
    plan = SeqPlan.balanced(200, sp.size)
    first, last = plan.range_of(sp.rank)
    options = {"backend": backend, "dtype": torch.float32}
    with torch.no_grad():
        want = LocalAttention(4, 16, **options)(*video)
        layer = DistributedAttention(4, 16, sp_group=sp, overlap=overlap, **options)
        got, _ = layer(*shards(video, plan, sp.rank), plan=plan)
    assert torch.equal(got, want[:, first:last])


def mixture_of_blocks(sp, scope, overlap):
    """VMoBA: the output has the same bits where every head chooses for itself; else it is refused."""
    from attnmux_vmoba.backend import VMOBAAttentionMetadataBuilder

    video, _, _, _ = case(sp.size, 4 * 4 * 6, 1, 4, 4, 0)
    options = {"backend": "VMOBA_ATTN", "dtype": torch.float64, "layer_idx": 0}
    metadata = VMOBAAttentionMetadataBuilder().build(
        0, (4, 4, 6), (1, 1, 1), temporal_chunk_size=1, temporal_topk=2, spatial_chunk_size=(2, 3), spatial_topk=2,
        st_chunk_size=(2, 2, 3), st_topk=2, moba_select_mode="threshold", moba_threshold_type=scope,
    )  # fmt: skip
    plan = SeqPlan.balanced(4 * 4 * 6, sp.size)
    first, last = plan.range_of(sp.rank)
    layer = DistributedAttention(4, DIM, sp_group=sp, overlap=overlap, **options)
    try:
        got, _ = layer(*shards(video, plan, sp.rank), plan=plan, attn_metadata=metadata)
    except UnsupportedRequestError as error:
        return str(error)
    assert torch.equal(got, LocalAttention(4, DIM, **options)(*video, attn_metadata=metadata)[:, first:last])
    return None


def groups(sp):
    """A mesh, a slice of one, the default and the scope all name the ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    assert dist.get_world_size() == 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    arguments = {"backend": "TORCH_SDPA", "dtype": torch.float64}
    of_slice = DistributedAttention(4, DIM, sp_group=mesh["sp"], **arguments)
    assert (of_slice.sp.size, of_slice.sp.rank) == (2, sp.rank % 2)
    of_two = DistributedAttention(4, DIM, sp_group=mesh, **arguments)
    assert (of_two.strategy, of_two.sp.size, of_two.sp.rank) == ("usp", 4, sp.rank)
    try:
        SPGroup.from_mesh(init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "c")))
    except UnsupportedRequestError as error:
        assert "must be a mesh of one dimension, or of two (ring, ulysses), got 3" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a mesh of three dimensions is taken")
    try:
        init_sequence_parallel(3)
    except UnsupportedRequestError as error:
        assert "size=3 must divide the world size 4" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a size that does not divide the world is taken")
    made = init_sequence_parallel(4, ulysses=2, timeout=sp.timeout)
    assert (made.ulysses.rank, made.ring.rank, made.rank) == (sp.rank % 2, sp.rank // 2, sp.rank)
    assert DistributedAttention(4, DIM, **arguments).strategy == "usp"
    found = init_sequence_parallel(2, timeout=sp.timeout)
    of_default = DistributedAttention(4, DIM, **arguments)
    assert of_default.sp == found
    with use_sp(dist.group.WORLD):
        assert DistributedAttention(4, DIM, **arguments).sp.size == 4
    with use_sp(SPGroup.local()):
        assert DistributedAttention(4, DIM, **arguments).sp.size == 1
    assert DistributedAttention(4, DIM, **arguments).sp == found
    # both pairs of ranks work on the same numbers at the same time
    video, _, _, _ = case(2, 6, 1, 4, 4, 0)
    plan = SeqPlan.balanced(6, 2)
    first, last = plan.range_of(sp.rank % 2)
    want = LocalAttention(4, DIM, **arguments)(*video)[:, first:last]
    for layer in (of_slice, of_default):
        near(layer(*shards(video, plan, sp.rank % 2))[0], want, "output")


def _own_group(sp, timeout, **options):
    """A group of all ranks for a test that leaves it out of step, so that the pool stays in step."""
    group = dist.new_group(list(range(sp.size)), timeout=datetime.timedelta(seconds=timeout))
    return SPGroup.from_group(group, timeout=timeout, **options)


def _failure(function):
    start = time.monotonic()
    try:
        function()
    except SequenceParallelError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("no error")


def _ones(rows, dtype=torch.float64):
    return torch.ones(1, rows, 4, DIM, dtype=dtype)


def disagree(sp, field):
    from attnmux import BackendSpec
    from attnmux.distributed import collective
    from attnmux.testing import FAKE_CAPABILITIES, FakeBackend, installed

    odd = sp.rank == sp.size - 1
    own = _own_group(sp, 5.0)
    fake = BackendSpec("FAKE_ATTN", target="fake:Fake", capabilities=FAKE_CAPABILITIES)
    with installed(fake, FakeBackend):
        layer = DistributedAttention(
            4,
            DIM,
            sp_group=own,
            backend="FAKE_ATTN" if field == "backend" and odd else "TORCH_SDPA",
            softmax_scale=0.3 if field == "softmax_scale" and odd else 0.5,
            strategy="ring" if field == "strategy" and odd else "ulysses",
            overlap=2 if field == "overlap" and odd else 1,
        )
    x = _ones(5 if field == "rows" and odd else 4, torch.float32 if field == "dtype" and odd else torch.float64)
    text = [_ones(2 if field == "text" and odd else 1, x.dtype)] * 3
    version = collective._VERSION
    if field == "version" and odd:
        collective._VERSION = "0.0.1"
    try:
        with count_traffic() as traffic:
            found = _failure(lambda: layer(x, x, x, None, *text))
    finally:
        collective._VERSION = version
    assert traffic.collectives == 0, "data moved before the ranks agreed"
    return found


def disagree_later(sp, checked):
    """Both kinds of call have been agreed on before; then the ranks make different ones."""
    if checked:
        os.environ["ATTNMUX_DIST_CHECK"] = "1"
    try:
        own = _own_group(sp, 1.5)
    finally:
        os.environ.pop("ATTNMUX_DIST_CHECK", None)
    assert own.checks_every_call is checked
    layer = DistributedAttention(4, DIM, sp_group=own, backend="TORCH_SDPA", dtype=torch.float64)
    for rows in (4, 5):
        layer(*[_ones(rows)] * 3)
    rows = 5 if sp.rank else 4
    # without the check: a kind that only one of the ranks knows
    return _failure(lambda: layer(*[_ones(rows if checked else (4, 6)[bool(sp.rank)])] * 3))


def missing(sp):
    own = _own_group(sp, 1.0)
    if sp.rank:
        return None
    layer = DistributedAttention(4, DIM, sp_group=own, backend="TORCH_SDPA", dtype=torch.float64)
    return _failure(lambda: layer(*[_ones(4)] * 3))


def missing_in_backward(sp):
    own = _own_group(sp, 1.0)
    layer = DistributedAttention(4, DIM, sp_group=own, backend="TORCH_SDPA", dtype=torch.float64)
    output, _ = layer(*[_ones(4).requires_grad_() for _ in range(3)])
    return None if sp.rank else _failure(lambda: output.sum().backward())


def dies(sp, strategy, backward, overlap):
    """The last rank dies where the others are in a collective already."""
    own = _own_group(sp, 3.0)
    options = {"backend": "TORCH_SDPA", "dtype": torch.float64, "strategy": strategy, "overlap": overlap}
    layer = DistributedAttention(4, DIM, sp_group=own, **options)
    inputs = [_ones(4).requires_grad_() for _ in range(3)]
    # the ranks have agreed on this call, so that nothing but the collective notices
    output, _ = layer(*inputs)
    output.sum().backward()
    output = layer(*inputs)[0] if backward else None
    if sp.rank == sp.size - 1:
        for name in ("all_to_all_single", "all_gather_single", "all_gather_into_tensor"):
            setattr(dist, name, lambda *_, **__: os._exit(1))
    return _failure(output.sum().backward if backward else lambda: layer(*inputs))


def hang(sp):
    time.sleep(60)
