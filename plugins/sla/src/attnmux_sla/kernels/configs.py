"""Tuning, as data. Sizes were chosen for one H100 80GB HBM3 (torch 2.11, triton 3.6)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamConfig:
    """A kernel that streams tokens once.

    tile: tokens per step. warps, stages: of the kernel. split: tokens of one program, a multiple of 256; each program of a
    reduction writes one partial state.
    """

    tile: int
    warps: int
    stages: int = 1
    split: int = 1024


@dataclass(frozen=True)
class SelectConfig:
    """Scores and top-k. rows: query blocks of a program. columns: key blocks per step. programs: at most."""

    rows: int
    columns: int
    warps: int
    programs: int


POOL = StreamConfig(tile=64, warps=4)
SUMMARIZE = StreamConfig(tile=64, warps=8, stages=3, split=1024)
FINISH = StreamConfig(tile=128, warps=8)
BACKWARD_Q = StreamConfig(tile=64, warps=8, stages=2, split=1024)
BACKWARD_K = StreamConfig(tile=64, warps=8)
SELECT = SelectConfig(rows=16, columns=64, warps=4, programs=528)
