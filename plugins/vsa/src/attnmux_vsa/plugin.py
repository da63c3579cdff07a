"""What attnmux knows about this backend before it is used: data, and no torch."""

from __future__ import annotations

from attnmux.spec import BackendSpec, Capabilities

__all__ = ["SPEC"]

SPEC = BackendSpec(
    name="VIDEO_SPARSE_ATTN",
    target="attnmux_vsa.backend:VideoSparseAttentionBackend",
    capabilities=Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        head_sizes=range(1, 1025),
        devices=frozenset({"cpu", "cuda"}),
        cuda_archs=frozenset({"any"}),
        gqa=True,
        softmax_scale=True,
        backward=True,
        deterministic=True,
        exactness="sparse",
        compile="fullgraph",
        sequence_parallel=frozenset({"ulysses"}),
        extra_inputs=frozenset({"gate_compress"}),
        needs_metadata=True,
    ),
    api=1,
    aliases=("VSA",),
    summary="Video Sparse Attention: top-k tiles of 4x4x4 tokens plus a gated coarse branch",
)
