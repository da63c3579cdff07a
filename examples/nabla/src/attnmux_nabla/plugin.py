"""What the backend can do, as data; imports no torch."""

from attnmux.spec import BackendSpec, Capabilities

SPEC = BackendSpec(
    "NABLA_ATTN",
    target="attnmux_nabla.backend:NablaBackend",
    capabilities=Capabilities(
        dtypes={"float16", "bfloat16", "float32", "float64"},
        head_sizes=range(16, 257, 16),
        devices={"cpu", "cuda"},
        cuda_archs={80, 86, 87, 89, 90, 100, 103, 120},
        softmax_scale=True,
        backward=True,
        deterministic=True,
        exactness="sparse",
        needs_metadata=True,
    ),
    aliases=("NABLA",),
    summary="the fewest 8x8 patches whose pooled attention weights reach a threshold",
)
