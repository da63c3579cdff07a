"""Tuning tables, as data. Measured on one H100 80GB HBM3 (torch 2.11, triton 3.6) where a row says so."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardConfig:
    """Plain Triton forward.

    tile_m, tile_n: query rows and keys per step (at most the block's). warps, stages: of the kernel.
    use_tma: tensor memory accelerator (sm90).
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    use_tma: bool = False


@dataclass(frozen=True)
class BackwardConfig:
    """One plain Triton backward kernel; the fields are those of `ForwardConfig`.

    early_dp: issue dP = dO V^T before the exponentials (dkdv only).
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    use_tma: bool = False
    early_dp: bool = False


@dataclass(frozen=True)
class TritonConfigs:
    """What the plain Triton engine runs for one head size on one kind of card."""

    forward: ForwardConfig
    dkdv: BackwardConfig
    dq: BackwardConfig


def triton_configs(head_dim_padded: int, capability: tuple[int, int], tma_ok: bool) -> TritonConfigs:
    """The table row for a padded head size (a power of two) and a compute capability."""
    small_memory = (capability[0] == 8 and capability[1] != 0) or capability[0] >= 12
    if head_dim_padded > 128:
        if capability[0] == 9:
            # H100, D=256, 64 x 64, keep 0.1: 273 TFLOP/s forward, 212 backward.
            return TritonConfigs(
                ForwardConfig(128, 64, 8, 2, tma_ok),
                BackwardConfig(64, 64, 8, 2, tma_ok),
                BackwardConfig(64, 64, 8, 2, tma_ok),
            )
        return TritonConfigs(ForwardConfig(64, 32, 8, 2), BackwardConfig(32, 32, 8, 1), BackwardConfig(32, 32, 8, 1))
    if capability[0] == 9:
        # H100, executed TFLOP/s at D=128, bf16: 480 forward (64 rows: 425), 565 dkdv, 550 dq; at D=64 372, 470 and 555.
        # 8 warps or larger backward tiles spill or are slower. An early dP gains 7 % at D=64 and 0 to 5 % at 128.
        return TritonConfigs(
            ForwardConfig(128, 64, 4, 2, tma_ok),
            BackwardConfig(64, 64, 4, 2, tma_ok, early_dp=tma_ok),
            BackwardConfig(64, 64, 4, 2, tma_ok),
        )
    if small_memory:
        return TritonConfigs(ForwardConfig(64, 64, 4, 2), BackwardConfig(32, 64, 4, 1), BackwardConfig(64, 32, 4, 1))
    return TritonConfigs(
        ForwardConfig(128, 64, 4 if head_dim_padded <= 64 else 8, 2),
        BackwardConfig(64, 64, 4, 2),
        BackwardConfig(64, 64, 4, 2),
    )


@dataclass(frozen=True)
class HopperForwardConfig:
    """Warp-specialised forward.

    pair: 64-key sub-blocks per stage, 1 or 2. stages: of the K and V rings. query_buffers: query tiles in shared memory, 1 or
    2. split: each consumer owns a 64-row tile. is_persistent: one program on every multiprocessor walks a fixed share
    of the tiles, else one program for each tile (two with split), placed by the hardware.
    """

    pair: int
    stages: int
    query_buffers: int
    split: bool
    is_persistent: bool = True


@dataclass(frozen=True)
class HopperDqConfig:
    """Warp-specialised dQ: the fields are those of `HopperForwardConfig`. Always one program for each tile or two."""

    pair: int
    stages: int
    split: bool


# Key: (head size, query tile rows). A pair without a row runs the plain Triton kernel, which measured the same or faster.
# H100, S=32768, H=12, keep 0.1, TFLOP/s: forward 590 at 128 x 128, 575 at 128 x 64, 475 at 64 x 64 (at the limit of the
# L2 cache), 418 with D=64. Lists of 1 .. 2 x the mean: 1.20 ms not persistent, 1.35 to 1.47 persistent (128 x 64).
HOPPER_FORWARD = {
    (128, 128): HopperForwardConfig(pair=2, stages=2, query_buffers=1, split=False),
    (128, 64): HopperForwardConfig(pair=1, stages=2, query_buffers=2, split=True),
    (64, 128): HopperForwardConfig(pair=2, stages=3, query_buffers=2, split=False),
}
HOPPER_DQ = {
    (128, 128): HopperDqConfig(pair=2, stages=2, split=False),
    (128, 64): HopperDqConfig(pair=1, stages=2, split=True),
}

# Fastest first, wherever it is supported. "fa4" is run by name alone: it adds up dQ in no fixed order on sm90, so its
# gradients are not the same bits from run to run.
AUTOMATIC_ORDER = ("hopper", "triton", "reference")

HOPPER_HEAD_SIZES = (64, 128)

# What flash-attn 4's sm90 tiles admit, forward and backward (4.0.0b36).
FA4_HEAD_SIZES = (64, 96, 128)
FA4_BLOCKS_Q = (128, 256)
FA4_BLOCKS_K = (128,)
