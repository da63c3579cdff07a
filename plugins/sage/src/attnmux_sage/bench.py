"""Cases of SAGE_ATTN and SAGE_SLA_ATTN for `attnmux bench` and `benchmarks/sage.py`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from attnmux.bench import Case, DensePattern, Prepared
from attnmux_sla import bench as sla_bench

if TYPE_CHECKING:
    import torch

__all__ = ["CASES", "LIMIT", "prepare"]

LIMIT = 0.05
"""Largest relative L2 error of the gate: eight bits measure 0.04 on unit normal inputs, a wrong block at least twice that."""

CASES = {
    "SAGE_ATTN": tuple(Case(name="sage", S_q=length, directions=("forward",)) for length in (32768, 8192)),
    "SAGE_SLA_ATTN": tuple(
        Case(name="sage_sla", S_q=length, keep=0.1, block_q=128, block_k=64, lists="top-k", directions=("forward",))
        for length in (32768, 76800)
    ),
}
"""Cases by backend, as `attnmux.bench` looks them up; forward only, there is no backward."""


def prepare(backend: str, case: Case, device: torch.device) -> Prepared:
    """Return metadata, pattern and limit of a case.

    Args:
        backend: "SAGE_ATTN" or "SAGE_SLA_ATTN".
        case: What is to be measured.
        device: Where the inputs live.
    """
    if backend == "SAGE_ATTN":
        return Prepared(DensePattern(case), limit=LIMIT)
    return dataclasses.replace(sla_bench.prepare("SLA_ATTN", case, device), limit=LIMIT)
