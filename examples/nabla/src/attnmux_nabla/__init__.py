"""Neighborhood Adaptive Block-Level Attention (arXiv 2507.13546) as an attnmux backend."""
