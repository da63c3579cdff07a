"""The accuracy table: distributions, figures that quantised attention must reach on them, and the measure."""

import torch
from torch.nn import functional as F

from attnmux_sage.ops import sage_attention

HEAD_SIZE = 128


def unit(q, k, v):
    return q, k, v


def outlier_channels(q, k, v):
    """The same four channels of Q and of K, ten times as large."""
    channels = torch.arange(5, HEAD_SIZE, HEAD_SIZE // 4, device=q.device)
    factor = torch.ones(HEAD_SIZE, device=q.device).index_fill(0, channels, 10.0).to(q.dtype)
    return q * factor, k * factor, v


def offset_keys(q, k, v):
    """Every channel of K with an offset of its own, which no query sees."""
    offset = 5 * torch.randn(HEAD_SIZE, generator=torch.Generator().manual_seed(3))
    return q, k + offset.to(k), v


def mean_values(q, k, v):
    return q, k, v + 1


def local_values(q, k, v):
    """Regions of 512 tokens that attend to themselves first, each with values around a mean of its own."""
    generator = torch.Generator().manual_seed(4)
    regions = torch.arange(q.shape[1], device=q.device) // 512
    size = (int(regions[-1]) + 1, q.shape[2], HEAD_SIZE)
    direction = (0.5 * torch.randn(size, generator=generator)).to(q)[regions]
    mean = torch.randn(size, generator=generator).to(q)[regions]
    return q + direction, k + direction, 0.3 * v + mean


def large_values(q, k, v):
    return q, k, v * (1e5 if v.dtype == torch.bfloat16 else 1e4)


# name: how the inputs are made; for each kind of P V the least cosine and the largest relative L1, and the largest bias
CASES = {
    "unit": (unit, {"fp8": (0.9992, 0.0385), "bf16": (0.9999, 0.012)}, None),
    "outlier_channels": (outlier_channels, {"fp8": (0.9992, 0.026), "bf16": (0.9999, 0.018)}, None),
    "offset_keys": (offset_keys, {"fp8": (0.9992, 0.0385), "bf16": (0.9999, 0.012)}, None),
    "mean_values": (mean_values, {"fp8": (0.9999, 0.0385), "bf16": (0.9999, 0.012)}, 0.005),
    "local_values": (local_values, {"fp8": (0.9992, 0.0385), "bf16": (0.9999, 0.012)}, 0.005),
    "large_values": (large_values, {"fp8": (0.9992, 0.0385), "bf16": (0.9999, 0.012)}, None),
}


def measure(out, exact):
    """Cosine, relative L1 error, and what part of itself the exact output has too much."""
    out, exact = out.double(), exact.double()
    return (
        F.cosine_similarity(out.flatten(), exact.flatten(), 0).item(),
        ((out - exact).abs().sum() / exact.abs().sum()).item(),
        (((out - exact) * exact).sum() / exact.square().sum()).item(),
    )


def exact_attention(q, k, v, rows):
    """Dense attention of some rows in float32, [B, len(rows), H, D]."""
    q, k, v = (x.float().transpose(1, 2) for x in (q[:, rows], k, v))
    return ((q @ k.transpose(-1, -2) * HEAD_SIZE**-0.5).softmax(-1) @ v).transpose(1, 2)


def measure_case(name, pv, device, length, engine=None):
    # the same numbers on every device
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, 2, HEAD_SIZE)
    draws = (torch.randn(shape, generator=generator).bfloat16().to(device) for _ in range(3))
    q, k, v = CASES[name][0](*draws)
    out = sage_attention(q, k, v, pv=pv, engine=engine)
    rows = torch.arange(0, length, 4, device=device)
    return measure(out[:, rows], exact_attention(q, k, v, rows))


def assert_accurate(name, pv, device, length, engine=None):
    cosine, l1, bias = measure_case(name, pv, device, length, engine)
    least, largest = CASES[name][1][pv]
    assert cosine >= least, (cosine, l1, bias)
    assert l1 <= largest, (cosine, l1, bias)
    allowed_bias = CASES[name][2]
    assert allowed_bias is None or abs(bias) <= allowed_bias, (cosine, l1, bias)
