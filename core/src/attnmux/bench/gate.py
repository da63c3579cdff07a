"""The correctness gate: sampled rows of the output and the gradients against dense math, before anything is timed."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from attnmux.testing.tolerance import RELATIVE_L2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnmux.bench.cases import Case

__all__ = ["DensePattern", "GateReport", "Pattern", "check_samples"]

_SAMPLED_TOKENS = 32
_CHUNK = 2048

_VANISHING = 64.0
"""A truth below so many roundings of its terms counts as zero: with one key, the gradient of its score is a difference of equal
numbers."""


class Pattern(Protocol):
    """Which key every query attends to."""

    def visible(self, batch: int, head: int, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return bool `[len(rows), len(keys)]` for positions of queries and keys, int64 on the pattern's device."""
        ...

    def pairs(self) -> int:
        """Return how many pairs of query and key attend, over all samples and query heads."""
        ...


class DensePattern:
    """Every key, or with `causal` those up to the query's own position, the last query aligned with the last key.

    Args:
        case: Gives lengths, heads and `causal`.
    """

    def __init__(self, case: Case) -> None:
        self._case = case

    def visible(self, batch: int, head: int, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return bool `[len(rows), len(keys)]` for positions of queries and keys."""
        if not self._case.causal:
            return torch.ones(len(rows), len(keys), dtype=torch.bool, device=rows.device)
        return keys <= rows[:, None] + self._case.S_k - self._case.S_q

    def pairs(self) -> int:
        """Return how many pairs of query and key attend, over all samples and query heads."""
        case = self._case
        of_one_head = case.S_q * case.S_k
        if case.causal:
            shift = case.S_k - case.S_q
            of_one_head = sum(max(0, row + 1 + shift) for row in range(case.S_q))
        return case.B * case.H * of_one_head


@dataclass
class GateReport:
    """What the gate found.

    Attributes:
        errors: Relative L2 error over the samples, by quantity: "out", "dq", "dk", "dv".
        limit: The largest error allowed.
        not_finite: Quantities that hold NaN or infinity anywhere, sampled or not.
    """

    errors: dict[str, float] = field(default_factory=dict)
    limit: float = 0.0
    not_finite: list[str] = field(default_factory=list)

    @property
    def problem(self) -> str:
        """What is wrong, with numbers; empty where the gate is green."""
        found = [f"{name} holds NaN or infinity" for name in self.not_finite]
        found += [
            f"relative L2 error of {name} {error:.2e}, allowed {self.limit:.0e}"
            for name, error in self.errors.items()
            # a NaN is not below the limit either
            if not error <= self.limit and name not in self.not_finite
        ]
        return "; ".join(found)


class _Sums:
    """Sums of squares of errors, truths and the terms that truths are sums of, by quantity."""

    def __init__(self) -> None:
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._precision = 0.0

    def add(self, name: str, result: torch.Tensor, truth: torch.Tensor, terms: torch.Tensor) -> None:
        """Count one sample; `terms` are sums of magnitudes, shaped like the truth."""
        held = self._sums.setdefault(name, [truth.new_zeros((), dtype=torch.float64) for _ in range(3)])
        for total, x in zip(held, (result.to(truth.dtype) - truth, truth, terms), strict=True):
            total += x.square().sum().double()
        self._precision = torch.finfo(truth.dtype).eps

    def relative(self) -> dict[str, float]:
        """Errors over truths; over the terms where the truth is no more than the rounding of their sum."""
        found = {}
        for name, sums in sorted(self._sums.items()):
            error, size, terms = (float(x) ** 0.5 for x in sums)
            vanishes = size <= _VANISHING * self._precision * terms
            found[name] = error / max(terms if vanishes else size, 1e-30)
        return found


def check_samples(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    pattern: Pattern,
    *,
    dout: torch.Tensor | None = None,
    grads: tuple[torch.Tensor, ...] | None = None,
    softmax_scale: float | None = None,
    limit: float | None = None,
    samples: int = 3,
    seed: int = 0,
) -> GateReport:
    """Compare sampled rows with softmax attention under a pattern.

    Args:
        q: `[B, S_q, H, D]`, any floating dtype, device and strides.
        k: `[B, S_k, H_kv, D]`, likewise.
        v: `[B, S_k, H_kv, D]`, likewise.
        out: The output that is judged, `[B, S_q, H, D]`.
        pattern: Which key every query attends to.
        dout: Gradient of the output; needed with `grads`.
        grads: Gradients of q, k and v that are judged; None = the output alone.
        softmax_scale: Factor on the scores; None = `D ** -0.5`.
        limit: Largest relative L2 error allowed; None = the error rule's number for the dtype of q.
        samples: Heads that are looked into; the end of the sequence is in each sample.
        seed: Chooses the samples.

    Numerics: float64 on a CPU, float32 without TF32 on other devices, float64 for float64 inputs. A gradient of k or v sums over
    every query that attends to the sampled keys, with a softmax of its own: no result of the judged code enters but `out`.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    named = {"out": out} | (dict(zip(("dq", "dk", "dv"), grads, strict=True)) if grads is not None else {})
    report = GateReport(limit=RELATIVE_L2[q.dtype] if limit is None else limit)
    report.not_finite = [name for name, x in named.items() if not bool(torch.isfinite(x).all())]
    chooser, sums = random.Random(seed), _Sums()
    with torch.no_grad(), _full_precision():
        for _ in range(samples):
            batch, head = chooser.randrange(q.shape[0]), chooser.randrange(q.shape[2])
            rows = _sampled_positions(chooser, q.shape[1], q.device)
            _check_rows(q, k, v, named, dout, pattern, scale, (batch, head), rows, sums)
            if grads is not None and dout is not None:
                keys = _sampled_positions(chooser, k.shape[1], q.device)
                _check_keys(q, k, v, named, dout, pattern, scale, (batch, head), keys, sums)
    report.errors = sums.relative()
    return report


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep float32 products exact inside the block, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _sampled_positions(chooser: random.Random, length: int, device: torch.device) -> torch.Tensor:
    start = chooser.randrange(max(1, length - _SAMPLED_TOKENS))
    ends = {*range(start, min(length, start + _SAMPLED_TOKENS)), *range(max(0, length - _SAMPLED_TOKENS), length)}
    return torch.tensor(sorted(ends), device=device)


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.device.type == "cpu" or x.dtype == torch.float64 else x.float()


def _weights(q_rows: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax weights; zeros where a query attends to nothing."""
    scores = (q_rows @ keys.T * scale).masked_fill_(~visible, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num_(0.0)


def _check_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    named: dict[str, torch.Tensor],
    dout: torch.Tensor | None,
    pattern: Pattern,
    scale: float,
    where: tuple[int, int],
    rows: torch.Tensor,
    sums: _Sums,
) -> None:
    """Judge out and dq of some queries."""
    batch, head = where
    head_kv = head // (q.shape[2] // k.shape[2])
    keys, values = _exact(k[batch, :, head_kv]), _exact(v[batch, :, head_kv])
    visible = pattern.visible(batch, head, rows, torch.arange(k.shape[1], device=q.device))
    weights = _weights(_exact(q[batch, rows, head]), keys, visible, scale)
    truth = weights @ values
    sums.add("out", named["out"][batch, rows, head], truth, weights @ values.abs())
    if dout is not None and "dq" in named:
        d_rows = _exact(dout[batch, rows, head])
        d_weights, delta = d_rows @ values.T, (d_rows * truth).sum(-1, keepdim=True)
        terms = weights * (d_weights.abs() + delta.abs()) @ keys.abs() * abs(scale)
        sums.add("dq", named["dq"][batch, rows, head], weights * (d_weights - delta) @ keys * scale, terms)


def _check_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    named: dict[str, torch.Tensor],
    dout: torch.Tensor,
    pattern: Pattern,
    scale: float,
    where: tuple[int, int],
    sampled: torch.Tensor,
    sums: _Sums,
) -> None:
    """Judge dk and dv of some keys: sums over every query of every head that attends to one of them."""
    batch, group = where[0], q.shape[2] // k.shape[2]
    head_kv = where[1] // group
    keys, values = _exact(k[batch, :, head_kv]), _exact(v[batch, :, head_kv])
    all_rows, all_keys = torch.arange(q.shape[1], device=q.device), torch.arange(k.shape[1], device=q.device)
    dk, dv = torch.zeros_like(keys[sampled]), torch.zeros_like(values[sampled])
    dk_terms, dv_terms = torch.zeros_like(dk), torch.zeros_like(dv)
    for head in range(head_kv * group, (head_kv + 1) * group):
        seeing = all_rows[pattern.visible(batch, head, all_rows, sampled).any(-1)]
        for rows in torch.split(seeing, _CHUNK):
            q_rows, d_rows = _exact(q[batch, rows, head]), _exact(dout[batch, rows, head])
            weights = _weights(q_rows, keys, pattern.visible(batch, head, rows, all_keys), scale)
            delta = (d_rows * (weights @ values)).sum(-1, keepdim=True)
            weights, d_weights = weights[:, sampled], d_rows @ values[sampled].T
            dv += weights.T @ d_rows
            dv_terms += weights.T @ d_rows.abs()
            dk += (weights * (d_weights - delta)).T @ q_rows * scale
            dk_terms += (weights * (d_weights.abs() + delta.abs())).T @ q_rows.abs() * abs(scale)
    sums.add("dk", named["dk"][batch, sampled, head_kv], dk, dk_terms)
    sums.add("dv", named["dv"][batch, sampled, head_kv], dv, dv_terms)
