from attnmux_nabla.conformance import Conformance as TestConformance

__all__ = ["TestConformance"]
