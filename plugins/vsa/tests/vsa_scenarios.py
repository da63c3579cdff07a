"""Inputs and the error rule of the kernels' tests."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnmux_vsa.ops import select_tiles, video_sparse_attention
from attnmux_vsa.prepare import build_video_tiling, tile_tokens
from attnmux_vsa.reference import score_means, tile_means


@dataclass(frozen=True)
class Scenario:
    """One call; `layout` says how the raster tensors lie in memory."""

    grid: tuple = (4, 8, 8)
    tile: tuple = (4, 4, 4)
    policy: str = "grid"
    batch: int = 1
    heads: int = 2
    heads_k: int = 2
    head_dim: int = 32
    topk: int = 2
    scale: float | None = None
    gate: bool = True
    magnitude: float = 1.0
    dtype: torch.dtype = torch.float32
    layout: str = "bshd"

    def but(self, **changes):
        return replace(self, **changes)


BASE = Scenario()
CASES = {
    "divisible": BASE,
    "no_gate": BASE.but(gate=False),
    "partial_tiles": BASE.but(grid=(5, 7, 3)),
    "adaptive": BASE.but(grid=(5, 7, 3), policy="adaptive"),
    "one_token": BASE.but(grid=(1, 1, 1), topk=1),
    "gqa": BASE.but(heads=4, heads_k=2, batch=2),
    "mqa_partial": BASE.but(heads=3, heads_k=1, grid=(3, 9, 5)),
    "head_dim_48": BASE.but(head_dim=48),
    "tile_448": BASE.but(tile=(4, 4, 8), grid=(4, 8, 20), topk=1),
    "tile_488_partial": BASE.but(tile=(4, 8, 8), grid=(6, 9, 10), topk=2),
    "every_tile": BASE.but(topk=4),
    "negative_scale": BASE.but(scale=-0.3),
    "zero_scale": BASE.but(scale=0.0),
    "heads_first": BASE.but(layout="bhsd", batch=2),
    "packed": BASE.but(layout="packed"),
    "large_inputs": BASE.but(magnitude=4.0),
}


def make_tensors(scenario, device="cpu", seed=0):
    """q, k, v, gate or None, dout and the tiling."""
    generator = torch.Generator().manual_seed(seed)
    tiling = build_video_tiling(
        scenario.grid, topk=scenario.topk, tile_size=scenario.tile, tile_policy=scenario.policy, device=device
    )
    length = tiling.total_seq_length

    def draw(heads, magnitude):
        x = torch.randn(scenario.batch, length, heads, scenario.head_dim, generator=generator, dtype=torch.float64)
        x = (x * magnitude).to(device, scenario.dtype)
        if scenario.layout == "bhsd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if scenario.layout == "packed":
            return torch.cat((x, x), -1).view(*x.shape[:2], heads, 2, -1).unbind(3)[0]
        return x

    q = draw(scenario.heads, scenario.magnitude)
    k, v = (draw(scenario.heads_k, scenario.magnitude) for _ in range(2))
    gate = draw(scenario.heads, 1.0) if scenario.gate else None
    return q, k, v, gate, draw(scenario.heads, 1.0), tiling


def run(q, k, v, gate, dout, tiling, scenario, engine=None, dtype=None, attend=video_sparse_attention):
    """The output and the gradients of q, k, v and, if there is one, the gate."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v, gate) if x is not None]
    out = attend(
        *leaves[:3],
        tiling,
        gate_compress=leaves[3] if gate is not None else None,
        softmax_scale=scenario.scale,
        engine=engine,
    )
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def torch_attention(q, k, v, gate, dout, tiling, scenario):
    """The same by PyTorch's own attention in the type of q, with a mask of tokens: the yardstick of the error rule."""
    sizes, volume = tiling.variable_block_sizes, math.prod(tiling.tile_size)
    kept = select_tiles(q, k, tiling, softmax_scale=scenario.scale)  # [B, H, N, topk]
    is_kept = torch.zeros(*kept.shape[:3], len(sizes), dtype=torch.bool, device=q.device).scatter_(-1, kept, True)
    tile = tiling.slot_of_token // volume
    mask = is_kept[:, :, tile][..., tile]  # [B, H, S, S]

    def attend(q, k, v, tiling, *, gate_compress, softmax_scale, engine):
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(SDPBackend.MATH) if scale <= 0 else nullcontext():
            out = F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
        if gate_compress is None:
            return out
        tiled = [tile_tokens(x.float(), tiling.slot_of_token, len(sizes), volume) for x in (q, k, v)]
        q_means, k_means, v_means = (tile_means(x, sizes) for x in tiled)
        values = v_means.repeat_interleave(q.shape[2] // v.shape[2], 1)
        coarse = (score_means(q_means, k_means, scale).softmax(-1) @ values).to(q.dtype)
        return out + gate_compress * coarse[:, :, tile].transpose(1, 2)

    return run(q, k, v, gate, dout, tiling, scenario, attend=attend)


def assert_follows_error_rule(got, exact, yardstick):
    """Twice (gradients: three times) the error of PyTorch's own attention in the type of got, and one rounding step."""
    names = ("out", "dq", "dk", "dv", "dgate")
    for name, a, b, c in zip(names, got, exact, yardstick, strict=False):
        assert torch.isfinite(a).all(), f"{name}: not finite"
        if b.norm() < 1e-9:
            # zero but for rounding, as the gradient of q where there is one key
            assert float(a.abs().max()) <= 16 * torch.finfo(a.dtype).eps, f"{name}: must vanish"
            continue
        factor = 2 if name == "out" else 3
        band = torch.finfo(a.dtype).eps * float(b.abs().max())
        error, allowed = float((a.double() - b).abs().max()), float((c.double() - b).abs().max())
        assert error <= factor * allowed + band, f"{name}: max error {error:.3e}, allowed {factor * allowed + band:.3e}"
        if name != "out":
            relative = float((a.double() - b).norm() / b.norm())
            assert relative <= 1e-2, f"{name}: relative L2 {relative:.3e}"
            assert abs(float(a.double().norm() / b.norm()) - 1) <= 5e-3, f"{name}: norms differ"
