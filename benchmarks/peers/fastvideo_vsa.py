"""fastvideo-kernel's whole Video Sparse Attention, with its Triton kernels, on tokens that are in tiles already."""

import os

from peers.requirements import refuse_unless

DISTRIBUTION = "fastvideo-kernel"


def video_sparse_attention(case, tiling):
    """A function of tiled q, k, v and gate [B, H, N * M, D]."""
    refuse_unless(case.H_kv == case.H, "as many key heads as query heads")
    refuse_unless(case.block_q == 64, "tiles of 64 tokens without its CUDA builds")
    os.environ["FASTVIDEO_VSA_TRITON"] = "1"
    from fastvideo_kernel.ops import video_sparse_attn

    sizes = tiling.variable_block_sizes

    def attend(q, k, v, gate):
        return video_sparse_attn(q, k, v, sizes, sizes, tiling.topk, tiling.tile_size, gate)

    return attend
