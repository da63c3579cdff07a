from attnmux_window.conformance import Conformance as TestConformance

__all__ = ["TestConformance"]
