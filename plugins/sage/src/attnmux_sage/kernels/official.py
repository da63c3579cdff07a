"""The engine `official`: the packages sageattention (2.2 and later) and spas_sage_attn, where a user has built them.

Neither is on a package index in a version that works, and builds differ: some return memory that was never written. So each is
compared with dense attention once per device and process before it may serve a call.
"""

from __future__ import annotations

import functools
import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from attnmux.spec import Reason
from attnmux_blocksparse.kernels import device_capability
from attnmux_blocksparse.prepare import mask_from_lists
from attnmux_sage.prepare import KEY_BLOCK, QUERY_TILE

if TYPE_CHECKING:
    from attnmux_sage.kernels import KernelRequest

__all__ = ["official_reasons", "run_official"]

DENSE, SPARSE = "sageattention", "spas_sage_attn"
DENSE_MINIMUM = (2, 2)
# Cards that both packages have kernels for with P V in e4m3. On others sageattention multiplies in float16, which overflows.
ARCHITECTURES = {DENSE: ((8, 9), (9, 0), (12, 0)), SPARSE: ((8, 9), (12, 0))}
# Largest relative L2 error of the check; our own kernels have 0.04.
ERROR_ALLOWED = 0.08
# The check's queries and keys: several tiles, the last ones short.
CHECKED_LENGTH = 456


def official_reasons(request: KernelRequest) -> list[Reason]:
    """Why the official packages cannot serve the call; empty if they can. The first call on a device runs the check."""
    package = SPARSE if request.has_lists else DENSE
    reasons = _package_reasons(package)
    q, k = request.q, request.k
    capability = device_capability(q)
    if capability is None:
        reasons.append(
            Reason("device", f"q is on {q.device.type!r}; an NVIDIA GPU is needed", "use engine='reference'")
        )
    elif capability not in ARCHITECTURES[package]:
        why = "; its blocks are 64 x 128 there" if package == SPARSE and capability == (9, 0) else ""
        supported = ", ".join(map(str, ARCHITECTURES[package]))
        reasons.append(
            Reason(
                "architecture", f"compute capability {capability}{why}; supported: {supported}", "use engine='triton'"
            )
        )
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(Reason("dtype", f"q is {q.dtype}; supported: bfloat16, float16", "cast"))
    if request.pv != "fp8":
        reasons.append(Reason("pv", f"pv={request.pv!r}; supported: 'fp8'", "use engine='triton'"))
    if not request.softmax_scale > 0:
        reasons.append(
            Reason(
                "softmax_scale",
                f"softmax_scale={request.softmax_scale!r}; a positive scale is needed",
                "use engine='triton'",
            )
        )
    lengths = f"S_q={q.shape[1]}, S_k={k.shape[1]}"
    if (request.causal or request.has_lists) and q.shape[1] != k.shape[1]:
        what = "causal attention" if request.causal else "block-sparse attention"
        reasons.append(Reason("lengths", f"{lengths}: {what} needs one length", "use engine='triton'"))
    if request.has_lists:
        if q.shape[1] < QUERY_TILE:
            reasons.append(Reason("lengths", f"{lengths}: at least {QUERY_TILE} are needed", "use engine='triton'"))
        if q.shape[2] != k.shape[2]:
            reasons.append(
                Reason("gqa", f"{q.shape[2]} query heads over {k.shape[2]} key heads", "use engine='triton'")
            )
        if q.shape[3] not in (64, 128):
            reasons.append(Reason("head_size", f"head_dim={q.shape[3]}; supported: 64, 128", "use engine='triton'"))
        if request.needs_lse:
            reasons.append(Reason("lse", "the log-sum-exp is not returned", "use engine='triton'"))
    if not reasons and (failure := _check(package, q.device)):
        reasons.append(Reason("self_check", failure, "rebuild the package, or use engine='triton'"))
    return reasons


def _package_reasons(package: str) -> list[Reason]:
    if find_spec(package) is None:
        source = {DENSE: "thu-ml/SageAttention", SPARSE: "thu-ml/SpargeAttn"}[package]
        return [Reason(package, f"{package} is not installed", f"build github.com/{source}, or use engine='triton'")]
    if package == DENSE:
        found = _installed_version(package)
        numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
        if numbers < DENSE_MINIMUM:
            minimum = ".".join(map(str, DENSE_MINIMUM))
            return [Reason(package, f"{package} {found or 'of unknown version'}; at least {minimum} is needed")]
    return []


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def _check(package: str, device: torch.device) -> str:
    """Return how a package fails on a small call; empty if it does not. Waits for the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first call of {package} on a device is checked, which a CUDA graph cannot capture; call it once before"
        )
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, CHECKED_LENGTH, 2, 64, generator=generator, device=device, dtype=torch.float32).bfloat16()
        for _ in range(3)
    )
    # an offset that smoothing has to take off, and a mean that a sloppy accumulator loses
    k, v = k + 2 * k[:, :1], v + 1
    before = [x.clone() for x in (q, k, v)]
    blocks = counts = None
    visible = torch.ones(1, 1, CHECKED_LENGTH, CHECKED_LENGTH, dtype=torch.bool, device=device)
    if package == SPARSE:
        tiles, num_blocks = -(-CHECKED_LENGTH // QUERY_TILE), -(-CHECKED_LENGTH // KEY_BLOCK)
        blocks = torch.arange(num_blocks, device=device, dtype=torch.int32)[1::2].expand(1, 2, tiles, -1).contiguous()
        counts = torch.full((1, 2, tiles), blocks.shape[-1], device=device, dtype=torch.int32)
        visible = visible & (torch.arange(CHECKED_LENGTH, device=device) // KEY_BLOCK % 2 == 1)
    try:
        out, _ = run_official(q, k, v, blocks, counts, softmax_scale=0.2, causal=False)
    except Exception as error:  # noqa: BLE001 - whatever a foreign build raises is the reason not to use it
        return f"{package} raised {type(error).__name__}: {error}"
    if not all(map(torch.equal, before, (q, k, v))):
        return f"{package} changes its inputs"
    rows = [x.float().transpose(1, 2) for x in (q, k, v)]
    scores = (rows[0] @ rows[1].transpose(-1, -2) * 0.2).masked_fill(~visible, float("-inf"))
    exact = (scores.softmax(-1) @ rows[2]).transpose(1, 2)
    error_found = ((out.float() - exact).norm() / exact.norm()).item()
    # NaN fails too
    if not error_found <= ERROR_ALLOWED:
        return f"{package} is off by {error_found:.3g} (relative L2) on a small call, allowed {ERROR_ALLOWED}"
    return ""


def run_official(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor | None,
    counts: torch.Tensor | None,
    *,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [B, S_q, H, D] in the type of q and the log-sum-exp [B, H, S_q], float32; zeros in its place with lists."""
    with torch.cuda.device_of(q):
        if blocks is None or counts is None:
            attend = importlib.import_module(DENSE).sageattn
            out, lse = attend(q, k, v, tensor_layout="NHD", is_causal=causal, sm_scale=softmax_scale, return_lse=True)
            return out.to(q.dtype).contiguous(), lse.float().contiguous()
        attend = importlib.import_module(SPARSE).block_sparse_sage2_attn_cuda
        mask = mask_from_lists(blocks, counts, -(-k.shape[1] // KEY_BLOCK))
        mask = mask.expand(q.shape[0], q.shape[2], -1, -1).to(torch.int8).contiguous()
        # It casts v to float16; with every channel's largest value at 1 that cannot overflow.
        largest = v.abs().amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        rows = (x.transpose(1, 2) for x in (q, k, v / largest))
        out = attend(*rows, mask_id=mask, scale=softmax_scale, tensor_layout="HND").transpose(1, 2) * largest
        is_empty = (counts == 0).repeat_interleave(QUERY_TILE, -1)[..., : q.shape[1]].transpose(-1, -2)[..., None]
        return (
            out.masked_fill(is_empty, 0.0).to(q.dtype).contiguous(),
            torch.zeros(q.shape[0], q.shape[2], q.shape[1], device=q.device),
        )
