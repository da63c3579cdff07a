from attnmux_vsa import conformance


class TestConformance(conformance.VideoSparseAttentionConformance):
    """The contract of every backend; `attnmux check VIDEO_SPARSE_ATTN` runs the same."""
