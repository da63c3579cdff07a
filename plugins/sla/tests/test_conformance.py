from attnmux_sla import conformance


class TestConformance(conformance.SLAAttentionConformance):
    """The contract of every backend; `attnmux check SLA_ATTN` runs the same."""
