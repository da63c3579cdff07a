"""Tuning tables, as data. Measured on one H100 80GB HBM3 (torch 2.11, triton 3.6) where a row says so."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SelectConfig:
    """The choice of chunks. rows: queries of a tile. step: channels per product; all keep the queries. warps: of the kernel."""

    rows: int
    step: int
    warps: int


def select_config(cols: int) -> SelectConfig:
    """The table row for a number of chunks, rounded up to a power of two, 16 to 512; above 128 not measured."""
    # Warps of 16 rows: a row's best is then found within a warp, without shared memory. H100, 30,720 tokens, 12 heads, 80 chunks,
    # top-k 8, with the means: 0.28 ms (128 rows and 8 warps 0.29, those with steps of 64 channels 0.34).
    if cols <= 128:
        return SelectConfig(64, 128, 4)
    if cols == 256:
        return SelectConfig(64, 32, 8)
    return SelectConfig(32, 32, 8)


@dataclass(frozen=True)
class AttendConfig:
    """Attention of the rows of sorted pairs.

    rows: of a tile, a divisor of 128. keys: per step. warps: of the kernel. stages: steps whose rows are in shared memory at
    once. tiles: that a program takes where all that there is room for are in use.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tiles: int = 4


@dataclass(frozen=True)
class AttendConfigs:
    """What runs for one head size: the forward pass on tiles, on walked ranges, dK with dV, and dQ."""

    forward: AttendConfig
    walk: AttendConfig
    dkdv: AttendConfig
    dq: AttendConfig


def attend_configs(head_dim_padded: int, chunk_tokens: int) -> AttendConfigs:
    """The table row for a head size, rounded up to a power of two, and a number of tokens a chunk."""
    if head_dim_padded > 128:
        # not measured
        return AttendConfigs(*(AttendConfig(64, 32, 4, 2),) * 2, *(AttendConfig(32, 32, 4, 2),) * 2)
    # H100, D=128, 30,720 tokens, 12 heads, chunks of 384, top-k 8: forward 2.0 ms (128 keys and 8 warps 2.1, but with chunks of
    # 1,920, top-k 3, 2.8 for 3.0), dkdv 2.6 ms (128 keys and 8 warps 2.8), dq 2.3 ms (128 rows and 8 warps 2.7). Walked, 8.4 chunks
    # a range: 1.46 ms, and with 8.9 1.54 (64 keys and 8 warps 1.81, 4 warps 2.09, 32 keys and 4 warps 1.75, 64 rows and 64
    # keys 1.73); dq the same with 64 rows and with 128. Where all is walked, the launches for tiles take 0.02 ms with four tiles a
    # program (one 0.07).
    tile, wide = AttendConfig(64, 64, 4, 2), AttendConfig(128, 128, 8, 2)
    return AttendConfigs(wide if chunk_tokens >= 1024 else AttendConfig(128, 64, 4, 2), wide, tile, tile)
