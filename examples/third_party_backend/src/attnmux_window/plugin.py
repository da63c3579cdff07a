"""What the backend can do, as data; imports no torch."""

from attnmux.spec import BackendSpec, Capabilities

SPEC = BackendSpec(
    "WINDOW_ATTN",
    target="attnmux_window.backend:WindowBackend",
    capabilities=Capabilities(
        dtypes={"float16", "bfloat16", "float32", "float64"},
        head_sizes=range(1, 1025),
        devices={"cpu", "cuda"},
        cuda_archs={"any"},
        softmax_scale=True,
        backward=True,
        exactness="sparse",
    ),
    summary="every query sees the keys within a window around it",
)
