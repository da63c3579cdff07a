"""What ranks run that exchange heads in groups; run as "overlap_jobs.<name>"."""

from unittest.mock import patch

import torch
from jobs import DIM, case, shards
from torch._C._distributed_c10d import _get_work_registry_size

from attnmux import DistributedAttention, SeqPlan
from attnmux.distributed import collective, exchange, exchange_ops
from attnmux.distributed.collective import count_traffic


def overlapped(sp, shape, overlap):
    """The same bits forward and backward as without; returns what was sent."""
    length, batch, heads, kv_heads, text, rotary, padded = shape
    video, words, (weight, _), freqs = case(sp.size, length, batch, heads, kv_heads, text)
    plan = SeqPlan.padded(length, -(-length // sp.size) + 1, sp.size) if padded else SeqPlan.balanced(length, sp.size)
    first, last = plan.range_of(sp.rank)

    def run(groups):
        layer = DistributedAttention(
            heads, DIM, kv_heads, sp_group=sp, backend="TORCH_SDPA", dtype=torch.float64, overlap=groups
        )
        mine, my_words = shards(video, plan, sp.rank), [x.clone().requires_grad_() for x in words]
        with count_traffic() as forward:
            got, got_text = layer(*mine, None, *my_words, freqs_cis=freqs if rotary else None, plan=plan)
        loss = (got[:, : last - first] * weight[:, first:last]).sum() + (got_text.square().sum() if text else 0)
        with count_traffic() as backward:
            loss.backward()
        counts = forward.collectives, forward.elements_sent, backward.collectives, backward.elements_sent
        return [got, *(x.grad for x in (*mine, *my_words)), *([got_text] if text else [])], counts

    (want, plain), (got, counts) = run(1), run(overlap)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    return plain, counts


def order(sp, overlap):
    """What is sent and waited for, in order, forward and backward."""
    log, begin, wait = [], collective.exchange, collective.arrived

    def begins(*arguments, **options):
        operation, settings = arguments[3:5]
        group = settings.rpartition("overlap_group=")[2] if overlap > 1 else 0
        log.append(f"send {operation} {group}")
        return begin(*arguments, **options)

    def waits(under_way, operation, settings):
        log.append(f"wait {operation}")
        before = _get_work_registry_size()
        found = wait(under_way, operation, settings)
        assert _get_work_registry_size() == before - (overlap > 1)
        return found

    layer = DistributedAttention(4, DIM, sp_group=sp, backend="TORCH_SDPA", dtype=torch.float64, overlap=overlap)
    with (
        patch.object(exchange_ops, "exchange", begins),
        patch.object(exchange_ops, "arrived", waits),
        patch.object(exchange, "arrived", waits),
    ):
        output, _ = layer(*[torch.randn(1, 3, 4, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3)])
        forward = log.copy()
        log.clear()
        output.sum().backward()
    return forward, log
