"""What adapters ask of a case."""

from importlib.metadata import PackageNotFoundError, version

from attnmux.errors import UnsupportedRequestError


def refuse_unless(condition, what):
    """Raise UnsupportedRequestError with what the peer takes, unless the condition holds."""
    if not condition:
        raise UnsupportedRequestError(f"the peer takes {what}")


def refuse_partial_blocks(case, index):
    """Refuse cases in which a block is not full."""
    is_whole = case.S_q % case.block_q == 0 and case.S_k % case.block_k == 0
    refuse_unless(is_whole and index.q_lengths is None and index.k_lengths is None, "whole blocks only")


def installed_version(distribution):
    """The version of a distribution, empty if unknown."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def per_head(case, x):
    """Lists or counts with the batch and head dimensions spelled out, contiguous."""
    return x.expand(case.B, case.H, *x.shape[2:]).contiguous()
