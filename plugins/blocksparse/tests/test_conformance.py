from attnmux_blocksparse import conformance


class TestConformance(conformance.BlockSparseAttentionConformance):
    """The contract of every backend; `attnmux check BLOCK_SPARSE_ATTN` runs the same."""
