"""FlexAttention of torch, compiled, with the lists as full blocks; takes [B, H, S, D]."""

import dataclasses
import functools

import torch

from attnmux.bench import Workload
from attnmux_blocksparse.bench import ListPattern
from peers.requirements import per_head, refuse_partial_blocks


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(case, index):
    refuse_partial_blocks(case, index)
    if index.blocks.device.type == "cpu":
        # it has no backward there, and after an attempt its compiled forward is wrong
        case = dataclasses.replace(case, directions=("forward",))
    from torch.nn.attention.flex_attention import BlockMask

    # its lists are as wide as the sequence
    counts = per_head(case, index.counts)
    lists = torch.zeros(*counts.shape, index.num_key_blocks, dtype=torch.int32, device=counts.device)
    lists[..., : index.blocks.shape[-1]] = index.blocks
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(lists),
        counts,
        lists,
        BLOCK_SIZE=(case.block_q, case.block_k),
        seq_lengths=(case.S_q, case.S_k),
    )
    options = {}
    if min(case.block_q, case.block_k) < 128:
        # its own choice of tile does not divide such blocks
        options = {"BLOCK_M": 64, "BLOCK_N": 64}
    uses_gqa = case.H_kv != case.H
    return Workload(
        case=case,
        backend="FLEX_ATTENTION",
        engine="triton",
        attend=lambda q, k, v: _compiled()(
            q, k, v, block_mask=mask, enable_gqa=uses_gqa, kernel_options=options or None
        ),
        pattern=ListPattern(index, case),
        is_peer=True,
        layout="BHSD",
        extra={"version": torch.__version__},
    )
