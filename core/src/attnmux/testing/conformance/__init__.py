"""The conformance suite that a backend's author subclasses.

class TestConformance(BackendConformance):
backend = "MY_ATTN"
"""

from attnmux.testing.conformance.cases import Case, DenseLimit
from attnmux.testing.conformance.suite import BackendConformance

__all__ = ["BackendConformance", "Case", "DenseLimit"]
