"""What attnmux knows about this backend before it is used: data, and no torch."""

from __future__ import annotations

from attnmux.spec import BackendSpec, Capabilities

__all__ = ["SPEC"]

SPEC = BackendSpec(
    name="SLA_ATTN",
    target="attnmux_sla.backend:SLAAttentionBackend",
    capabilities=Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
        head_sizes=range(16, 257, 16),
        devices=frozenset({"cpu", "cuda"}),
        cuda_archs=frozenset({"any"}),
        gqa=True,
        cross_attention=True,
        softmax_scale=True,
        backward=True,
        deterministic=True,
        exactness="sparse",
        trainable_parameters=True,
        compile="fullgraph",
        sequence_parallel=frozenset({"ulysses"}),
    ),
    api=1,
    aliases=("SLA",),
    summary="Sparse-Linear Attention: softmax over the top-k key blocks plus a projected linear branch",
)
