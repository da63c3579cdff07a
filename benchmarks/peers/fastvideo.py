"""fastvideo-kernel: its block-sparse Triton kernels for 64 x 64 blocks, and its copy of SLA's kernels.

Both take [B, H, S, D]. The backward of the first transposes the lists each time, as its users see it.
"""

import torch

from attnmux.bench import Workload
from attnmux_blocksparse.bench import ListPattern
from peers.requirements import installed_version, per_head, refuse_partial_blocks, refuse_unless

DISTRIBUTION = "fastvideo-kernel"


def fastvideo_triton(case, index):
    refuse_unless(case.blocks == "64x64", "blocks of 64x64")
    refuse_unless(case.H_kv == case.H, "as many key heads as query heads")
    refuse_unless(case.S_q % 64 == 0 and case.S_k % 64 == 0, "lengths in steps of 64")
    from fastvideo_kernel.block_sparse_attn import block_sparse_attn_triton

    blocks, counts = per_head(case, index.blocks), per_head(case, index.counts)
    # its lengths are of key blocks, shared by all samples
    sizes = torch.full((index.num_key_blocks,), 64, dtype=torch.int32, device=blocks.device)
    if index.k_lengths is not None:
        sizes = index.k_lengths[0].contiguous()
    return Workload(
        case=case,
        backend="FASTVIDEO",
        engine="triton",
        attend=lambda q, k, v: block_sparse_attn_triton(q, k, v, blocks, counts, sizes)[0],
        pattern=ListPattern(index, case),
        is_peer=True,
        layout="BHSD",
        extra={"version": installed_version(DISTRIBUTION)},
    )


def sla_triton(case, index):
    refuse_unless(case.blocks in ("64x64", "128x64"), "blocks of 64x64 or 128x64")
    refuse_unless(case.H_kv == case.H and case.S_q == case.S_k, "equal heads and lengths of queries and keys")
    refuse_unless(index.even_rows, "lists of one length only")
    refuse_partial_blocks(case, index)
    from fastvideo_kernel.triton_kernels import sla_triton as kernels

    # int64 lists and an int8 mask: what its own block selection makes
    lists = per_head(case, index.blocks).long()
    mask = per_head(case, index.to_block_mask()).to(torch.int8)
    return Workload(
        case=case,
        backend="SLA",
        engine="triton",
        attend=lambda q, k, v: kernels._attention.apply(
            q, k, v, mask, lists, lists.shape[-1], case.block_q, case.block_k
        ),
        pattern=ListPattern(index, case),
        is_peer=True,
        layout="BHSD",
        extra={"version": installed_version(DISTRIBUTION)},
    )
