"""What the ranks of a pool run. Each job compares with LocalAttention on the whole sequence and raises where it differs."""

import torch

from attnmux import LocalAttention
from attnmux.distributed import SeqPlan
from attnmux.distributed.exchange import count_traffic
from attnmux.layers import DistributedAttention


def case(size, length, batch, heads, kv_heads, text, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(rows, n):
        return torch.randn(batch, rows, n, dim, generator=generator, dtype=torch.float64)

    video = [make(length, n) for n in (heads, kv_heads, kv_heads)]
    words = [make(text, n) for n in (heads, kv_heads, kv_heads)] if text else []
    # one weight of the sequence's output; every rank weighs the text differently
    weights = make(length, heads), [make(text, heads) for _ in range(size)]
    angles = torch.randn(length, dim // 2, generator=generator, dtype=torch.float64)
    return video, words, weights, (angles.cos(), angles.sin())


def local(layer, video, words, freqs):
    from attnmux.rotary import apply_rotary

    q, k, v = video
    if freqs is not None:
        q, k = apply_rotary(q, freqs), apply_rotary(k, freqs)
    length = q.shape[1]
    if words:
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), words, strict=True))
    output = layer(q, k, v)
    return output[:, :length], output[:, length:]


def compare(sp, length, batch, heads, kv_heads, text, rotary, padded, causal=False):
    video, words, (weight, text_weights), freqs = case(sp.size, length, batch, heads, kv_heads, text)
    freqs = freqs if rotary else None
    arguments = dict(num_kv_heads=kv_heads, causal=causal, backend="TORCH_SDPA", dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in video]
    whole_words = [x.clone().requires_grad_() for x in words]
    want, want_text = local(LocalAttention(heads, 8, **arguments), whole, whole_words, freqs)
    ((want * weight).sum() + sum((want_text * w).sum() for w in text_weights)).backward()

    rows = -(-length // sp.size)
    plan = SeqPlan.padded(length, rows, sp.size) if padded else SeqPlan.balanced(length, sp.size)
    first, last = plan.range_of(sp.rank)
    count, missing = last - first, plan.rows[sp.rank] - (last - first)
    # what lies in rows of padding must not matter
    shard = [
        torch.nn.functional.pad(x[:, first:last], (0, 0, 0, 0, 0, missing), value=7.0).requires_grad_() for x in video
    ]
    mine = [x.clone().requires_grad_() for x in words]
    layer = DistributedAttention(heads, 8, sp_group=sp, **arguments)
    options = dict(original_seq_len=length) if padded else dict(plan=plan)
    with count_traffic() as forward:
        got, got_text = layer(
            *shard, **dict(zip(("replicated_q", "replicated_k", "replicated_v"), mine)), freqs_cis=freqs, **options
        )
    loss = (got[:, :count] * weight[:, first:last]).sum()
    if text:
        loss = loss + (got_text * text_weights[sp.rank]).sum()
    with count_traffic() as backward:
        loss.backward()

    def near(a, b, what):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")

    near(got[:, :count], want[:, first:last], "output")
    assert not got[:, count:].any()
    for name, x, y in zip("qkv", shard, whole, strict=True):
        near(x.grad[:, :count], y.grad[:, first:last], f"gradient of {name}")
        assert not x.grad[:, count:].any()
    if text:
        near(got_text, want_text, "text")
    else:
        assert got_text is None
    # each rank has the gradient of its heads
    for name, x, y in zip("qkv", mine, whole_words):
        total = x.grad.clone()
        if sp.size > 1:
            torch.distributed.all_reduce(total)
        near(total, y.grad, f"gradient of text {name}")
    return (forward.collectives, forward.elements_sent, backward.collectives, backward.elements_sent)


def one_rank_bits(sp):
    video, _, _, freqs = case(1, 7, 2, 4, 2, 0)
    arguments = dict(num_kv_heads=2, backend="TORCH_SDPA", dtype=torch.float64)
    want = LocalAttention(4, 8, **arguments)(*video, freqs)
    got, text = DistributedAttention(4, 8, sp_group=sp, **arguments)(*video, freqs_cis=freqs)
    assert text is None and torch.equal(got, want)


def compiled(sp):
    video, words, _, freqs = case(sp.size, 9, 2, 5, 5, 3)
    plan = SeqPlan.balanced(9, sp.size)
    first, last = plan.range_of(sp.rank)
    layer = DistributedAttention(5, 8, sp_group=sp, backend="TORCH_SDPA", dtype=torch.float64)

    def run(function):
        shard = [x[:, first:last].clone().requires_grad_() for x in video]
        got, text = function(*shard, None, *words, freqs, plan=plan)
        (got.square().sum() + text.square().sum()).backward()
        return [got, text, *(x.grad for x in shard)]

    for a, b in zip(run(torch.compile(layer, fullgraph=True, backend="aot_eager")), run(layer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def checkpointed(sp):
    from torch.utils.checkpoint import checkpoint

    video, _, _, _ = case(sp.size, 8, 1, 4, 4, 0)
    plan = SeqPlan.balanced(8, sp.size)
    first, last = plan.range_of(sp.rank)
    layer = DistributedAttention(4, 8, sp_group=sp, backend="TORCH_SDPA", dtype=torch.float64)

    def run(function):
        shard = [x[:, first:last].clone().requires_grad_() for x in video]
        function(*shard)[0].square().sum().backward()
        return [x.grad for x in shard]

    for a, b in zip(run(lambda *x: checkpoint(layer, *x, use_reentrant=False)), run(layer), strict=True):
        assert torch.equal(a, b)


def disagree(sp, field):
    from attnmux.errors import SequenceParallelError

    odd = sp.rank == sp.size - 1
    dtype = torch.float32 if field == "dtype" and odd else torch.float64
    rows = 5 if field == "rows" and odd else 4
    layer = DistributedAttention(
        4, 8, sp_group=sp, backend="TORCH_SDPA", softmax_scale=0.3 if field == "softmax_scale" and odd else 0.5
    )
    x = torch.ones(1, rows, 4, 8, dtype=dtype)
    try:
        layer(x, x, x)
    except SequenceParallelError as error:
        return str(error)
    raise AssertionError("not found")


def missing(sp):
    import dataclasses

    from attnmux.errors import SequenceParallelError

    if sp.rank:
        return None
    # a group of its own: this rank's count of checks is ahead afterwards
    layer = DistributedAttention(
        4, 8, sp_group=dataclasses.replace(sp, timeout=1.0), backend="TORCH_SDPA", dtype=torch.float64
    )
    x = torch.ones(1, 17, 4, 8, dtype=torch.float64)
    try:
        layer(x, x, x)
    except SequenceParallelError as error:
        return str(error)
    raise AssertionError("not found")


def video_sparse(sp, gated):
    from attnmux.layers import DistributedAttention_VSA
    from attnmux_vsa.backend import VideoSparseAttentionMetadataBuilder

    video, _, _, freqs = case(sp.size, 7 * 5 * 3, 1, 4, 4, 0)
    gate = video[0].flip(1) if gated else None
    metadata = VideoSparseAttentionMetadataBuilder().build(0, (7, 5, 3), (1, 1, 1), 0.5)
    options = dict(backend="VIDEO_SPARSE_ATTN", dtype=torch.float64)
    plan = SeqPlan.balanced(7 * 5 * 3, sp.size)
    first, last = plan.range_of(sp.rank)
    whole = [x.clone().requires_grad_() for x in video]
    want = LocalAttention(4, 8, **options)(*whole, freqs, attn_metadata=metadata, gate_compress=gate)
    want.square().sum().backward()
    shard = [x[:, first:last].clone().requires_grad_() for x in video]
    layer = DistributedAttention_VSA(4, 8, sp_group=sp, **options)
    shard_gate = gate[:, first:last] if gated else None
    with count_traffic() as traffic:
        got, text = layer(*shard, None, gate_compress=shard_gate, freqs_cis=freqs, attn_metadata=metadata, plan=plan)
    got.square().sum().backward()
    assert text is None and torch.equal(got, want[:, first:last])
    for a, b in zip(shard, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad[:, first:last], rtol=1e-12, atol=1e-12)
    return traffic.collectives, traffic.elements_sent
