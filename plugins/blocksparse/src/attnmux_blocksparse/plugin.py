"""What attnmux knows about this backend before it is used: data, and no torch."""

from __future__ import annotations

from attnmux.spec import BackendSpec, Capabilities

__all__ = ["SPEC"]

SPEC = BackendSpec(
    name="BLOCK_SPARSE_ATTN",
    target="attnmux_blocksparse.backend:BlockSparseAttentionBackend",
    capabilities=Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        head_sizes=range(16, 257, 16),
        devices=frozenset({"cpu", "cuda"}),
        cuda_archs=frozenset({80, 86, 87, 89, 90, 100, 103, 120}),
        gqa=True,
        cross_attention=True,
        softmax_scale=True,
        backward=True,
        deterministic=True,
        returns_lse=True,
        exactness="sparse",
        compile="fullgraph",
        sequence_parallel=frozenset({"ulysses"}),
        needs_metadata=True,
    ),
    api=1,
    aliases=("BLOCK_SPARSE",),
    summary="softmax attention over a list of key blocks for every query block, which the caller gives",
)
