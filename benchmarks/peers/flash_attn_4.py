"""flash-attn-4, dense and block-sparse; takes [B, S, H, D]."""

import torch

from attnmux.bench import DensePattern, Workload
from attnmux_blocksparse import BlockIndex
from attnmux_blocksparse.bench import ListPattern
from peers.requirements import installed_version, per_head, refuse_partial_blocks, refuse_unless

DISTRIBUTION = "flash-attn-4"


def _output(result):
    return result[0] if isinstance(result, tuple) else result


def _workload(case, engine, attend, pattern):
    return Workload(
        case=case,
        backend="FLASH_ATTN_4",
        engine=engine,
        attend=attend,
        pattern=pattern,
        is_peer=True,
        extra={"version": installed_version(DISTRIBUTION)},
    )


def flash_attn_4(case):
    from flash_attn.cute import flash_attn_func

    def attend(q, k, v):
        return _output(flash_attn_func(q, k, v, causal=case.causal))

    return _workload(case, "cute", attend, DensePattern(case))


def flash_attn_4_sparse(case, index):
    refuse_unless(case.block_q % 128 == 0 and case.block_k % 128 == 0, "blocks in steps of 128")
    refuse_partial_blocks(case, index)
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    def tensors(lists):
        counts, blocks = per_head(case, lists.counts), per_head(case, lists.blocks)
        return BlockSparseTensorsTorch(
            mask_block_cnt=torch.zeros_like(counts),
            mask_block_idx=torch.zeros_like(blocks),
            full_block_cnt=counts,
            full_block_idx=blocks,
            block_size=(case.block_q, case.block_k),
        )

    lists = tensors(index)
    lists_of_keys = None
    if "backward" in case.directions:
        # the query blocks of every key block, in the same form
        mask = index.to_block_mask().transpose(-1, -2)
        lists_of_keys = tensors(BlockIndex.from_block_mask(mask, block_q=case.block_k, block_k=case.block_q))

    def attend(q, k, v):
        return _output(flash_attn_func(q, k, v, block_sparse_tensors=lists, block_sparse_tensors_bwd=lists_of_keys))

    return _workload(case, "cute, block-sparse", attend, ListPattern(index, case))
