"""Tuning tables, as data. Not measured yet: chosen by what the compiler says of registers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SelectConfig:
    """The choice of chunks. rows: queries of a tile. step: channels per product. warps: of the kernel."""

    rows: int
    step: int
    warps: int


def select_config(cols: int) -> SelectConfig:
    """The table row for a number of chunks, rounded up to a power of two, 16 to 512."""
    # four warps of 16 rows each: a row's best is then found within a warp, without shared memory
    if cols <= 128:
        return SelectConfig(64, 64, 4)
    if cols == 256:
        return SelectConfig(64, 32, 8)
    return SelectConfig(32, 32, 8)
