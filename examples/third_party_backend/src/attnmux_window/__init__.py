"""Sliding-window attention for attnmux."""
