"""Tuning tables, as data. Measured on one H100 80GB HBM3 (torch 2.11, triton 3.6) where a row says so."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TritonConfig:
    """Plain Triton forward: query rows per program (64 or 128), warps and pipeline stages of the kernel."""

    tile_m: int
    warps: int
    stages: int


@dataclass(frozen=True)
class HopperConfig:
    """Warp-specialised forward.

    stages: of the K and V rings, 128 keys each. query_buffers: query tiles in shared memory, 1 or 2. is_persistent: one program
    on every multiprocessor walks a fixed share of the tiles, else one program for each tile, placed by the hardware.
    """

    stages: int
    query_buffers: int
    is_persistent: bool = True


@dataclass(frozen=True)
class QuantiseConfig:
    """The pass that writes the 8-bit tensors: blocks of 64 rows per program (it makes the rotation once), warps and stages."""

    blocks: int
    warps: int
    stages: int


QUANTISE = QuantiseConfig(4, 4, 1)


def triton_config(fp8: bool) -> TritonConfig:
    """The row for e4m3 or half-precision P V."""
    return TritonConfig(64, 4, 3) if fp8 else TritonConfig(128, 8, 3)


def hopper_config(fp8: bool) -> HopperConfig:
    """The row for e4m3 or half-precision P V."""
    return HopperConfig(4, 2) if fp8 else HopperConfig(2, 2)


# Fastest first, wherever it is supported.
AUTOMATIC_ORDER = ("hopper", "triton", "reference")
