"""Calls and how kernels are judged on them, shared by the interpreter tests and the GPU tests."""

from dataclasses import dataclass, replace

import torch

from attnmux.testing import make_inputs
from attnmux_sage.prepare import dequantise_values, quantise
from attnmux_sla.prepare import pool_blocks


@dataclass(frozen=True)
class Scenario:
    """One call; keys and values have an offset for every channel."""

    batch: int = 1
    len_q: int = 200
    len_k: int = 200
    heads: int = 2
    heads_k: int = 2
    head_size: int = 64
    dtype: torch.dtype = torch.float16
    layout: str = "contiguous"
    softmax_scale: float = 0.11
    causal: bool = False
    is_listed: bool = False
    pv: str = "fp8"
    input_scale: float = 1.0

    def but(self, **changes):
        return replace(self, **changes)


def make_tensors(scenario, device="cpu", seed=0):
    q, k, v = make_inputs(
        batch=scenario.batch,
        length_q=scenario.len_q,
        length_k=scenario.len_k,
        num_heads=scenario.heads,
        num_kv_heads=scenario.heads_k,
        head_size=scenario.head_size,
        dtype=scenario.dtype,
        device=device,
        layout=scenario.layout,
        input_scale=scenario.input_scale,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    offset = 2 * torch.randn(1, 1, scenario.heads_k, scenario.head_size, generator=generator)
    k += offset.to(k)
    v += 1
    return q, k, v


def make_lists(scenario, device="cpu", seed=1, keep=0.4):
    """Lists and counts; the last query block has none, and what lies behind a count is no block."""
    if not scenario.is_listed:
        return None, None
    tiles, blocks_k = -(-scenario.len_q // 128), -(-scenario.len_k // 64)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(scenario.batch, scenario.heads, tiles, blocks_k, generator=generator) < keep
    mask[:, :, -1] = False
    mask[:, :, 0, -1] = True
    counts = mask.sum(-1, dtype=torch.int32)
    blocks = torch.where(mask, torch.arange(blocks_k), 10**6).sort(-1).values[..., : int(counts.max())]
    return blocks.int().contiguous().to(device), counts.to(device)


def assert_like_emulation(out, lse, wanted, wanted_lse):
    """Hold a kernel to the emulation: the same but for weights that rounding to e4m3 takes to the other side."""
    assert out.isfinite().all()
    size = wanted.float().norm().clamp_min(1e-6)
    assert (out.float() - wanted.float()).norm() / size < 4e-3
    is_empty = wanted_lse == float("-inf")
    assert torch.equal(is_empty, lse == float("-inf"))
    assert lse[~is_empty].isfinite().all()
    assert (lse - wanted_lse).masked_fill(is_empty, 0.0).abs().max() < 1e-3 * max(
        1.0, wanted_lse[~is_empty].abs().max().item()
    )


def assert_pooling_agrees(scenario, pv, device):
    """Hold the quantisation that shares SLA's passes to the one in PyTorch."""
    from attnmux_sage.kernels.launch import quantise_pooling
    from attnmux_sla.kernels.launch import summarize_keys

    q, k, v = make_tensors(scenario, device)
    pooled_k, state, _, range_v = summarize_keys(k, v, 64, "softmax", True)
    found, pooled_q = quantise_pooling(q, k, v, pooled_k, state, range_v, softmax_scale=scenario.softmax_scale, pv=pv)
    torch.testing.assert_close(pooled_q, pool_blocks(q, 128), rtol=1e-5, atol=1e-5 * scenario.input_scale)
    without_values = {"v8": None, "v_scale": None, "v_rest": None}
    wanted = quantise(q, k, v, softmax_scale=scenario.softmax_scale, fp8_values=False)
    assert_same_tensors(replace(found, **without_values), replace(wanted, lse_shift=None))
    assert (found.v8 is None) == (pv == "bf16")
    if pv == "fp8":
        # the mean that is taken off first is not exact, but what is left of v has the rest as its mean
        size = scenario.head_size
        kept = dequantise_values(found)[:, :, : scenario.len_k, :size] * found.v_scale[:, :, None, :size]
        left, rest = v.float().transpose(1, 2) - kept, found.v_rest[:, :, None, :size]
        torch.testing.assert_close(left.mean(2, keepdim=True), rest, rtol=1e-5, atol=1e-5 * scenario.input_scale)
        step = kept.abs() / 15 + found.v_scale[:, :, None, :size] * 2**-9
        # of two roundings, one of them averaged
        assert ((left - rest).abs() <= step + step.mean(2, keepdim=True) + 1e-6 * scenario.input_scale).all()
        varies = v.amax(1) > v.amin(1)
        assert (kept.abs().amax(2) / found.v_scale[..., :size] > 440)[varies].all()


def assert_same_tensors(found, wanted):
    """Hold the kernels' quantisation to PyTorch's: integers that sums in another order move by one are rare."""
    torch.testing.assert_close(found.q_scale, wanted.q_scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.k_scale, wanted.k_scale, rtol=1e-5, atol=1e-12)
    assert (found.lse_shift is None) == (wanted.lse_shift is None)
    if wanted.lse_shift is not None:
        torch.testing.assert_close(found.lse_shift, wanted.lse_shift, rtol=1e-4, atol=1e-4)
    for a, b in ((found.q8, wanted.q8), (found.k8, wanted.k8)):
        step = (a.int() - b.int()).abs()
        assert step.max() <= 1
        assert (step > 0).float().mean() < 1e-3
    assert (found.v8 is None) == (wanted.v8 is None)
    if wanted.v8 is not None:
        torch.testing.assert_close(found.v_scale, wanted.v_scale, rtol=1e-5, atol=0)
        # A number that falls on the other side of a half moves the mean by a step of its own, 32 at most.
        len_k = found.k8.shape[2]
        torch.testing.assert_close(
            found.v_rest, wanted.v_rest, rtol=1e-4, atol=64 / len_k * wanted.v_scale.max().item()
        )
        # Places in the row of all e4m3 numbers, where both zeros are one: a value that is its channel's mean becomes either.
        codes = (x.v8.view(torch.int8).int() for x in (found, wanted))
        a, b = (torch.where(x < 0, -(x & 127), x) for x in codes)
        assert ((a - b).abs() > 1).sum() == 0
        assert (a != b).float().mean() < 1e-3
