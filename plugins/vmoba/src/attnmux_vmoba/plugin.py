"""What attnmux knows about this backend before it is used: data, and no torch."""

from __future__ import annotations

from attnmux.spec import BackendSpec, Capabilities

__all__ = ["SPEC"]

SPEC = BackendSpec(
    name="VMOBA_ATTN",
    target="attnmux_vmoba.backend:VMOBAAttentionBackend",
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
        # scopes that couple heads are refused at the first call where heads are split
        sequence_parallel=frozenset({"ulysses"}),
        needs_metadata=True,
    ),
    api=1,
    aliases=("VMOBA",),
    summary="Video Mixture-of-Block Attention: every query attends to its own chunk and to those that score best",
)
