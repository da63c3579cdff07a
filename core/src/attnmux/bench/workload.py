"""One function to measure on one case: inputs, gate, times, rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from attnmux.bench.gate import check_samples
from attnmux.bench.harness import measure
from attnmux.bench.record import make_row
from attnmux.testing.inputs import AttentionInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attnmux.backend import AttentionMetadata
    from attnmux.bench.cases import Case
    from attnmux.bench.gate import GateReport, Pattern
    from attnmux.bench.harness import Clock
    from attnmux.bench.record import Environment

__all__ = ["Prepared", "Workload", "measure_workload", "refused_rows"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A function that attends, with what is needed to judge it.

    Attributes:
        case: What it is measured on.
        backend: Name of the backend, or of the peer.
        engine: What runs, in the backend's words.
        attend: From q, k and v to the output, all in `layout`; differentiable where the case asks for "backward".
        pattern: Which key every query attends to.
        is_peer: Whether it is another project's.
        layout: "BSHD" or "BHSD": the order of dimensions that `attend` takes, contiguous in that order.
        limit: Largest relative L2 error that the gate allows; None = the error rule's.
        extra: Further keys of its rows.
    """

    case: Case
    backend: str
    engine: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    pattern: Pattern
    is_peer: bool = False
    layout: Literal["BSHD", "BHSD"] = "BSHD"
    limit: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """What a backend needs for one case beyond q, k and v.

    Attributes:
        pattern: Which key every query attends to.
        attn_metadata: Passed to the layer.
        extra_inputs: The backend's own tensors, passed to the layer by name.
        impl_args: The backend's own constructor arguments.
        limit: Largest relative L2 error that the gate allows; None = the error rule's. A backend that approximates on
            purpose says here by how much.
    """

    pattern: Pattern
    attn_metadata: AttentionMetadata | None = None
    extra_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    impl_args: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None


def refused_rows(
    case: Case,
    environment: Environment,
    *,
    backend: str,
    engine: str = "",
    is_peer: bool = False,
    gate: Literal["failed", "not run"] = "not run",
    refused: str,
    done: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Return rows without numbers for the directions of a case that are not `done`, with the reason."""
    return [
        make_row(
            case, direction, environment, backend=backend, engine=engine, is_peer=is_peer, gate=gate, refused=refused
        )
        for direction in case.directions
        if direction not in done
    ]


def measure_workload(
    workload: Workload, clock: Clock, environment: Environment, *, device: torch.device, budget_s: float = 0.25
) -> Iterator[dict[str, Any]]:
    """Yield one row per direction of the case: the gate first, then the times; a red gate gives no number.

    Whatever the function raises passes through, after the rows of the directions before.

    Args:
        workload: What is measured.
        clock: Times it.
        environment: Where.
        device: Where the inputs live.
        budget_s: Seconds for the timed runs of one direction.
    """
    case = workload.case
    native = draw_inputs(case, device)
    if workload.layout != "BSHD":
        native = AttentionInputs(*(x.transpose(1, 2).contiguous() for x in native))
    for direction in ("forward", "backward"):
        if direction not in case.directions:
            continue
        if direction == "forward":
            yield _measure_forward(workload, native, clock, environment, budget_s)
        else:
            yield _measure_backward(workload, native, clock, environment, budget_s)


def draw_inputs(case: Case, device: torch.device) -> AttentionInputs:
    """Return q `[B, S_q, H, D]`, k and v `[B, S_k, H_kv, D]` on which a case is measured: unit normals, always the same.

    For a plugin whose pattern depends on q and k.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def draw(length: int, heads: int) -> torch.Tensor:
        return torch.randn(case.B, length, heads, case.D, generator=generator, device=device, dtype=dtype)

    return AttentionInputs(draw(case.S_q, case.H), draw(case.S_k, case.H_kv), draw(case.S_k, case.H_kv))


def _measure_forward(
    workload: Workload, native: AttentionInputs, clock: Clock, environment: Environment, budget_s: float
) -> dict[str, Any]:
    def run() -> torch.Tensor:
        return workload.attend(*native)

    with torch.no_grad():
        out = run()
        q, k, v, out_rows = (_rows_first(workload, x) for x in (*native, out))
        report = check_samples(q, k, v, out_rows, workload.pattern, limit=workload.limit)
        del out, out_rows
        return _time(workload, "forward", run, report, native, clock, environment, budget_s)


def _measure_backward(
    workload: Workload, native: AttentionInputs, clock: Clock, environment: Environment, budget_s: float
) -> dict[str, Any]:
    leaves = AttentionInputs(*(x.detach().requires_grad_() for x in native))
    out = workload.attend(*leaves)
    dout = torch.randn_like(native.q)

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    grads = run()
    q, k, v, out_rows, dout_rows = (_rows_first(workload, x.detach()) for x in (*native, out, dout))
    report = check_samples(
        q,
        k,
        v,
        out_rows,
        workload.pattern,
        dout=dout_rows,
        grads=tuple(_rows_first(workload, x) for x in grads),
        limit=workload.limit,
    )
    del grads
    return _time(workload, "backward", run, report, native, clock, environment, budget_s)


def _rows_first(workload: Workload, x: torch.Tensor) -> torch.Tensor:
    """Return a view `[B, S, H, D]`."""
    return x if workload.layout == "BSHD" else x.transpose(1, 2)


def _time(
    workload: Workload,
    direction: str,
    run: Callable[[], object],
    report: GateReport,
    native: AttentionInputs,
    clock: Clock,
    environment: Environment,
    budget_s: float,
) -> dict[str, Any]:
    """Return the row: with times if the gate is green."""
    timing, extra = None, dict(workload.extra)
    if not report.problem:
        extra |= _extra_memory(run, native)
        timing = measure(run, clock, budget_s=budget_s)
    row = make_row(
        workload.case,
        direction,
        environment,
        backend=workload.backend,
        engine=workload.engine,
        is_peer=workload.is_peer,
        gate="red" if report.problem else "green",
        errors=report.errors,
        timing=timing,
        pairs=workload.pattern.pairs(),
        refused=f"the results are wrong: {report.problem}" if report.problem else "",
    )
    return row | extra


def _extra_memory(run: Callable[[], object], native: AttentionInputs) -> dict[str, float]:
    """Return the peak of memory of one run, results included, over the size of q, k, v and out; on CUDA only."""
    if native.q.device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(native.q.device)
    before = torch.cuda.memory_allocated(native.q.device)
    run()
    size = sum(x.numel() * x.element_size() for x in (*native, native.q))
    return {"extra_memory": (torch.cuda.max_memory_allocated(native.q.device) - before) / size}
