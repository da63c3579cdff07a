"""Radial Attention (arXiv 2506.19852) as an attnmux backend."""
