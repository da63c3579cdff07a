"""What the backend can do, as data; imports no torch."""

from attnmux.spec import BackendSpec, Capabilities

SPEC = BackendSpec(
    "RADIAL_ATTN",
    target="attnmux_radial.backend:RadialBackend",
    capabilities=Capabilities(
        dtypes={"float16", "bfloat16", "float32", "float64"},
        head_sizes=range(16, 257, 16),
        devices={"cpu", "cuda"},
        cuda_archs={80, 86, 87, 89, 90, 100, 103, 120},
        gqa=True,
        softmax_scale=True,
        backward=True,
        deterministic=True,
        exactness="sparse",
        compile="fullgraph",
        needs_metadata=True,
    ),
    aliases=("RADIAL",),
    summary="a band of positions that halves with every doubling of the distance between frames",
)
