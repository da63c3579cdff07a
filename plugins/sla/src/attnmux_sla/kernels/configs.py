"""Tuning, as data. Sizes were chosen for one H100 80GB HBM3 (torch 2.11, triton 3.6)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamConfig:
    """A kernel that streams tokens once.

    tile: tokens per step. warps, stages: of the kernel. split: tokens of one program, a multiple of 256; each program of a
    reduction writes one partial state. registers: of a thread at most, so that two programs share a multiprocessor; None =
    as many as it takes.
    """

    tile: int
    warps: int
    stages: int = 1
    split: int = 1024
    registers: int | None = None


@dataclass(frozen=True)
class Configs:
    """All kernels of the engine on one kind of card."""

    pool: StreamConfig
    summarize: StreamConfig
    finish: StreamConfig
    backward_q: StreamConfig
    backward_kv: StreamConfig


_LARGE_MEMORY = Configs(
    pool=StreamConfig(tile=64, warps=2),
    summarize=StreamConfig(tile=64, warps=8, stages=3),
    finish=StreamConfig(tile=32, warps=4),
    backward_q=StreamConfig(tile=64, warps=8, stages=2),
    backward_kv=StreamConfig(tile=32, warps=4),
)
# Under 100 KB of shared memory.
_SMALL_MEMORY = Configs(
    pool=_LARGE_MEMORY.pool,
    summarize=StreamConfig(tile=64, warps=8),
    finish=_LARGE_MEMORY.finish,
    backward_q=StreamConfig(tile=32, warps=8),
    backward_kv=_LARGE_MEMORY.backward_kv,
)


def kernel_configs(capability: tuple[int, int]) -> Configs:
    """The table row for a compute capability."""
    has_small_memory = (capability[0] == 8 and capability[1] != 0) or capability[0] >= 12
    return _SMALL_MEMORY if has_small_memory else _LARGE_MEMORY
