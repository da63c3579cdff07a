from attnmux_vmoba import conformance


class TestConformance(conformance.VMOBAAttentionConformance):
    """The contract of every backend; `attnmux check VMOBA_ATTN` runs the same."""
