"""Inputs, oracle and error rule shared by the interpreter tests and the GPU tests."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnmux_blocksparse import BlockIndex, prepare, reference


@dataclass(frozen=True)
class Scenario:
    """One call of the operator.

    layout: "bshd" contiguous, "bhsd" heads before sequence in memory, "packed" one buffer for q, k and v (equal lengths).
    partial: valid lengths on both sides, blocks of 0 valid tokens included. keep: chance of a block. empty_rows: lists without
    entries. even_rows: what the index says of its rows. shared: one list for all batches and heads. magnitude:
    factor on q, k and v.
    """

    batch: int = 2
    len_q: int = 192
    len_k: int = 192
    heads: int = 2
    heads_k: int = 2
    head_dim: int = 16
    block_q: int = 64
    block_k: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = "bshd"
    partial: bool = False
    finite_padding: bool = False
    keep: float = 0.5
    empty_rows: bool = False
    shared: bool = False
    magnitude: float = 1.0
    softmax_scale: float | None = None
    even_rows: bool = False

    def but(self, **changes):
        return replace(self, **changes)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale


def _tensor(generator, scenario, length, heads, device):
    shape = (scenario.batch, length, heads, scenario.head_dim)
    if scenario.layout == "bhsd":
        shape = (shape[0], shape[2], shape[1], shape[3])
    x = (torch.randn(shape, generator=generator) * scenario.magnitude).to(device=device, dtype=scenario.dtype)
    return x.transpose(1, 2) if scenario.layout == "bhsd" else x


def make_tensors(scenario: Scenario, device="cpu", seed=0):
    """q, k, v, dout, index; with `partial` and not `finite_padding` the padding of q, k and v is NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = _tensor(generator, scenario, scenario.len_q, scenario.heads, device)
    k = _tensor(generator, scenario, scenario.len_k, scenario.heads_k, device)
    v = _tensor(generator, scenario, scenario.len_k, scenario.heads_k, device)
    dout = torch.randn(q.shape, generator=generator).to(device=device, dtype=scenario.dtype)
    if scenario.layout == "packed":
        q, k, v = torch.stack([q, k, v], 2).unbind(2)
    blocks_q, blocks_k = -(-scenario.len_q // scenario.block_q), -(-scenario.len_k // scenario.block_k)
    leading = (1, 1) if scenario.shared else (scenario.batch, scenario.heads)
    mask = torch.rand(*leading, blocks_q, blocks_k, generator=generator) < scenario.keep
    if scenario.empty_rows:
        mask[..., ::2, :] = False
    else:
        mask[..., 0] |= ~mask.any(-1)
    lengths = {}
    if scenario.partial:
        q_lengths = torch.randint(1, scenario.block_q + 1, (blocks_q,), generator=generator, dtype=torch.int32)
        k_lengths = torch.randint(
            0, scenario.block_k + 1, (scenario.batch, blocks_k), generator=generator, dtype=torch.int32
        )
        k_lengths[:, 0] = 5
        lengths = {"q_lengths": q_lengths.to(device), "k_lengths": k_lengths.to(device)}
    index = BlockIndex.from_block_mask(
        mask.to(device),
        block_q=scenario.block_q,
        block_k=scenario.block_k,
        finite_padding=scenario.finite_padding,
        even_rows=scenario.even_rows,
        validate="full",
        **lengths,
    )
    if scenario.partial and not scenario.finite_padding:
        for x, rows, block in (
            (q, index.q_lengths, scenario.block_q),
            (k, index.k_lengths, scenario.block_k),
            (v, index.k_lengths, scenario.block_k),
            (dout, index.q_lengths, scenario.block_q),
        ):
            position = torch.arange(x.shape[1], device=device)
            is_padding = position % block >= rows.repeat_interleave(block, -1)[:, : x.shape[1]]
            x.masked_fill_(is_padding.expand(x.shape[0], -1)[..., None, None], float("nan"))
    return q, k, v, dout, index


def token_mask(index, batch, heads, len_q, len_k):
    """Mask [B, H, S_q, S_k]: whether the query token attends to the key token."""
    blocks_k = -(-len_k // index.block_k)
    blocks = prepare.mask_from_lists(index.blocks, index.counts, blocks_k)
    tokens = blocks.repeat_interleave(index.block_q, 2)[:, :, :len_q].repeat_interleave(index.block_k, 3)[..., :len_k]
    device = index.blocks.device
    is_valid_q = prepare.valid_tokens(index.q_lengths, index.blocks.shape[2], index.block_q, len_q, device)
    is_valid_k = prepare.valid_tokens(index.k_lengths, blocks_k, index.block_k, len_k, device)
    return (tokens & is_valid_q[:, None, :, None] & is_valid_k[:, None, None, :]).expand(batch, heads, len_q, len_k)


def oracle(q, k, v, dout, index, scale, dlse=None):
    """out, lse, dq, dk, dv in float64."""
    wide = [x.double() for x in (q, k, v)]
    out, lse = reference.attention_forward(*wide, index, scale)
    return out, lse, *reference.attention_backward(dout.double(), dlse, *wide, index, scale)


def torch_attention(q, k, v, dout, index, scale):
    """out, dq, dk, dv of PyTorch's own attention in the type of q, under the same mask: the yardstick of the error rule."""
    mask = token_mask(index, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    is_empty = ~mask.any(-1)
    leaves = [torch.nan_to_num(x.detach()).transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    # PyTorch's fused kernels take positive scales only.
    options = {"attn_mask": mask | is_empty[..., None], "scale": scale, "enable_gqa": q.shape[2] != k.shape[2]}
    with sdpa_kernel(SDPBackend.MATH) if scale <= 0 else nullcontext():
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, **options)
    out = out.masked_fill(is_empty[..., None], 0.0)
    grads = torch.autograd.grad(out, leaves, torch.nan_to_num(dout).transpose(1, 2))
    return [x.detach().transpose(1, 2) for x in (out, *grads)]


def assert_close_to_oracle(name, got, exact, yardstick, factor):
    """max |got - exact| <= factor x that of the yardstick + one rounding step of the largest exact value."""
    assert torch.isfinite(got).all(), f"{name}: not finite"
    band = torch.finfo(got.dtype).eps * float(exact.abs().max())
    error = float((got.double() - exact).abs().max())
    allowed = factor * float((yardstick.double() - exact).abs().max()) + band
    assert error <= allowed, f"{name}: max error {error:.3e}, allowed {allowed:.3e}"


def assert_norms_agree(name, got, exact):
    """Relative L2 at most 1e-2 and norms within 0.5 %."""
    norm = exact.norm()
    if norm < 1e-9:
        # Zero but for rounding, as the gradient of q where there is one key.
        assert float(got.abs().max()) <= 16 * torch.finfo(got.dtype).eps, f"{name}: must vanish"
        return
    relative = float((got.double() - exact).norm() / norm)
    ratio = float(got.double().norm() / norm)
    assert relative <= 1e-2, f"{name}: relative L2 {relative:.3e}"
    assert abs(ratio - 1) <= 5e-3, f"{name}: norm ratio {ratio:.5f}"


def assert_call_is_right(q, k, v, dout, index, scale, out, lse, grads):
    """The whole error rule: output, LSE and gradients."""
    exact_out, exact_lse, *exact_grads = oracle(q, k, v, dout, index, scale)
    yard_out, *yard_grads = torch_attention(q, k, v, dout, index, scale)
    assert_close_to_oracle("out", out, exact_out, yard_out, 2)
    is_empty = torch.isinf(exact_lse)
    assert (lse[is_empty] == float("-inf")).all(), "lse: an empty row must be -inf"
    assert (out.transpose(1, 2)[is_empty] == 0).all(), "out: an empty row must be 0"
    error = float((lse.double() - exact_lse)[~is_empty].abs().max()) if (~is_empty).any() else 0.0
    assert error <= 1e-5 * max(1.0, float(exact_lse[~is_empty].abs().max()) if (~is_empty).any() else 1.0), (
        f"lse: {error:.3e}"
    )
    for name, got, exact, yard in zip(("dq", "dk", "dv"), grads, exact_grads, yard_grads, strict=True):
        assert_close_to_oracle(name, got, exact, yard, 3)
        assert_norms_agree(name, got, exact)
