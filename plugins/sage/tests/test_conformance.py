from attnmux_sage import conformance


class TestSage(conformance.SageAttentionConformance):
    """The contract of every backend; `attnmux check SAGE_ATTN` runs the same."""


class TestSageWithHalfTypeValues(conformance.SageAttentionConformance):
    """The same with P V in the type of v."""

    impl_args = {"pv": "bf16"}


class TestSageSLA(conformance.SageSLAAttentionConformance):
    """`attnmux check SAGE_SLA_ATTN` runs the same."""
