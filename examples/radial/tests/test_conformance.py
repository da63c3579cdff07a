from attnmux_radial.conformance import Conformance as TestConformance

__all__ = ["TestConformance"]
