"""What attnmux knows about these backends before they are used: data, and no torch."""

from __future__ import annotations

from attnmux.spec import BackendSpec, Capabilities

__all__ = ["SAGE_ATTN", "SAGE_SLA_ATTN"]

SAGE_ATTN = BackendSpec(
    name="SAGE_ATTN",
    target="attnmux_sage.backend:SageAttentionBackend",
    capabilities=Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        head_sizes=range(16, 129, 8),
        devices=frozenset({"cpu", "cuda"}),
        cuda_archs=frozenset({80, 86, 87, 89, 90, 100, 103, 120}),
        causal=True,
        gqa=True,
        cross_attention=True,
        softmax_scale=True,
        deterministic=True,
        returns_lse=True,
        exactness="quantized",
        compile="fullgraph",
        sequence_parallel=frozenset({"ulysses"}),
    ),
    api=1,
    aliases=("SAGE",),
    summary="dense attention in 8 bits: INT8 scores with smoothed keys, weights times values in e4m3 or half precision",
)

SAGE_SLA_ATTN = BackendSpec(
    name="SAGE_SLA_ATTN",
    target="attnmux_sage.backend:SageSLAAttentionBackend",
    capabilities=Capabilities(
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        head_sizes=range(16, 129, 16),
        devices=frozenset({"cpu", "cuda"}),
        cuda_archs=frozenset({80, 86, 87, 89, 90, 100, 103, 120}),
        gqa=True,
        cross_attention=True,
        softmax_scale=True,
        deterministic=True,
        exactness="quantized",
        trainable_parameters=True,
        compile="fullgraph",
        sequence_parallel=frozenset({"ulysses"}),
    ),
    api=1,
    aliases=("SAGE_SLA",),
    summary="Sparse-Linear Attention with its sparse branch in 8 bits; parameters and metadata of SLA_ATTN",
)
