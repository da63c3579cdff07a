"""Inputs of tests: seeded random q, k and v of odd lengths, several strides and magnitudes; and the tokens of a real clip."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attnmux.testing.clip import ClipTokens, clip_tokens

__all__ = [
    "INPUT_SCALES",
    "LAYOUTS",
    "ODD_LENGTHS",
    "AttentionInputs",
    "ClipTokens",
    "clip_tokens",
    "make_inputs",
    "with_layout",
]

INPUT_SCALES = (1.0, 4.0, 16.0)
"""Standard deviations of q, k and v under which a backend must hold its precision; at 16 softmax is nearly one-hot."""

ODD_LENGTHS = (1, 63, 65, 127, 1000)
"""Lengths in tokens that fall beside the usual tile sizes."""

LAYOUTS = ("contiguous", "heads_first", "packed", "padded_heads", "every_other_token")
"""Strides of `[B, S, H, D]`, D contiguous in all of them: as allocated; a transposed `[B, H, S, D]`; one third of a packed
`[B, S, 3, H, D]`; the first D channels of wider heads; every second token of a longer sequence."""


class AttentionInputs(NamedTuple):
    """Inputs of one attention call.

    Attributes:
        q: `[B, S_q, H, D]`.
        k: `[B, S_k, H_kv, D]`.
        v: `[B, S_k, H_kv, D]`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_inputs(
    *,
    batch: int = 2,
    length_q: int = 65,
    length_k: int | None = None,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_size: int = 32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    input_scale: float = 1.0,
    layout: str = "contiguous",
    seed: int = 0,
) -> AttentionInputs:
    """Return normally distributed q, k and v, the same numbers on every device and, up to rounding, in every dtype.

    Args:
        batch: Samples.
        length_q: Tokens of q.
        length_k: Tokens of k and v; None = `length_q`.
        num_heads: Heads of q.
        num_kv_heads: Heads of k and v; None = `num_heads`.
        head_size: Channels of one head.
        dtype: Floating dtype of all three.
        device: Where they live.
        input_scale: Standard deviation of the values.
        layout: One of `LAYOUTS`.
        seed: Of the generator; torch's global one is not touched.
    """
    # drawn in float64 on the CPU, since CUDA generators give other numbers
    generator = torch.Generator().manual_seed(seed)
    length_k = length_q if length_k is None else length_k
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads

    def draw(length: int, heads: int) -> torch.Tensor:
        x = torch.randn(batch, length, heads, head_size, generator=generator, dtype=torch.float64)
        return with_layout((x * input_scale).to(device=device, dtype=dtype), layout)

    return AttentionInputs(draw(length_q, num_heads), draw(length_k, num_kv_heads), draw(length_k, num_kv_heads))


def with_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the values of `x` `[B, S, H, D]` in memory of the given layout, NaN in the memory between them.

    Args:
        x: Floating tensor, any strides; not modified.
        layout: One of `LAYOUTS`.

    Raises:
        ValueError: The layout is unknown.
    """
    B, S, H, D = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        view = x.new_full((B, S, 3, H, D), float("nan"))[:, :, 1]
    elif layout == "padded_heads":
        # 8 more channels keep every row aligned to 16 bytes, as fast kernels ask
        view = x.new_full((B, S, H, D + 8), float("nan"))[..., :D]
    elif layout == "every_other_token":
        view = x.new_full((B, 2 * S, H, D), float("nan"))[:, ::2]
    else:
        raise ValueError(f"layout={layout!r} is unknown; expected one of {LAYOUTS}")
    return view.copy_(x)
