"""Calls, their oracle and the error rule, shared by the interpreter tests and the GPU tests."""

from dataclasses import dataclass, replace

import torch

from attnmux.testing import assert_close_to_oracle, dense_attention_baseline, make_inputs, measure_error
from attnmux_sla import select_blocks, sparse_linear_attention


@dataclass(frozen=True)
class Scenario:
    """One call of `sparse_linear_attention`; `input_scale` multiplies q, k and v."""

    batch: int = 1
    len_q: int = 192
    len_k: int = 192
    heads: int = 2
    heads_k: int = 2
    head_size: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    input_scale: float = 1.0
    topk_ratio: float = 0.34
    feature_map: str = "softmax"
    block_q: int = 128
    block_k: int = 64
    softmax_scale: float | None = None
    linear_keys: str = "all"
    projects: bool = True

    def but(self, **changes):
        return replace(self, **changes)

    @property
    def options(self):
        """Keywords of `sparse_linear_attention`."""
        names = ("topk_ratio", "feature_map", "block_q", "block_k", "softmax_scale", "linear_keys")
        return {name: getattr(self, name) for name in names}


def make_tensors(scenario, device="cpu", seed=0):
    """q, k, v, weight, bias (None where nothing is projected) and the gradient of the output."""
    inputs = make_inputs(
        batch=scenario.batch,
        length_q=scenario.len_q,
        length_k=scenario.len_k,
        num_heads=scenario.heads,
        num_kv_heads=scenario.heads_k,
        head_size=scenario.head_size,
        dtype=scenario.dtype,
        device=device,
        input_scale=scenario.input_scale,
        layout=scenario.layout,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    D = scenario.head_size
    weight, bias = torch.randn(D, D, generator=generator) * D**-0.5, torch.randn(D, generator=generator)
    dout = torch.randn(inputs.q.shape, generator=generator).to(inputs.q)
    projection = (weight.to(device), bias.to(device)) if scenario.projects else (None, None)
    return (*inputs, *projection, dout)


def forward_and_backward(tensors, dout, options, engine=None):
    """The output and the gradients of those tensors that there are."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out = sparse_linear_attention(*leaves, **options, engine=engine)
    grads = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], dout))
    return out.detach(), [None if x is None else next(grads) for x in leaves]


def same_blocks(scenario, q, k):
    """Whether rounding leaves the choice of blocks alone, without which no error bound holds."""
    options = {name: scenario.options[name] for name in ("topk_ratio", "block_q", "block_k", "softmax_scale")}
    ours = select_blocks(q, k, **options)
    exact = select_blocks(q.double(), k.double(), **options, engine="reference")
    return torch.equal(ours.blocks, exact.blocks)


def assert_call_is_right(scenario, tensors, out, grads):
    """The whole error rule, against the reference in float64; PyTorch's own dense attention is the yardstick."""
    *inputs, dout = tensors
    exact_out, exact_grads = forward_and_backward(
        [None if x is None else x.double() for x in inputs], dout.double(), scenario.options, engine="reference"
    )
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    yard, exact = (dense_attention_baseline(*x, softmax_scale=scenario.softmax_scale) for x in ((q, k, v), wide))
    baseline = measure_error(yard, exact)
    assert_close_to_oracle(out, exact_out, baseline, term_size=v.detach().double().square().mean().sqrt().item())
    errors = [
        measure_error(a, b)
        for a, b in zip(
            torch.autograd.grad(yard, (q, k, v), dout), torch.autograd.grad(exact, wide, dout.double()), strict=True
        )
    ]
    worst = errors[0].worst(errors[1]).worst(errors[2])
    size = dout.double().square().mean().sqrt().item() * inputs[2].double().square().mean().sqrt().item()
    for name, got, want, error in zip(
        ["q", "k", "v", "weight", "bias"], grads, exact_grads, [*errors, worst, worst], strict=True
    ):
        if got is not None:
            kind = {"kind": "gradient", "what": f"gradient of {name}", "dtype": scenario.dtype}
            terms = size * scenario.input_scale if name in "qk" else 0.0
            assert_close_to_oracle(got, want, error, term_size=terms, **kind)
