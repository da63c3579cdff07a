"""Measures backends through the layer: their cases, the gate, the times."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

from attnmux.bench.cases import DENSE_CASES, Case
from attnmux.bench.gate import DensePattern
from attnmux.bench.harness import make_clock
from attnmux.bench.workload import Prepared, Workload, measure_workload, refused_rows
from attnmux.errors import AttnmuxError, PluginApiError, PluginLoadError, UnsupportedRequestError
from attnmux.layers.local import LocalAttention
from attnmux.registry import LoadFailure, get_registry
from attnmux.selector import select_backend
from attnmux.spec import AttentionBackendEnum, AttentionRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    from attnmux.bench.harness import Clock
    from attnmux.bench.record import Environment
    from attnmux.spec import BackendSpec

__all__ = ["BenchOptions", "bench_module", "cases_of", "run_backend"]


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        device: Where.
        dtype: Of q, k and v; None = that of the case, on a CPU float32.
        directions: What to measure: some of "forward", "backward".
        shapes: (B, S, H, D) in place of those of the cases; empty = the cases' own, shrunk on a CPU.
        is_quick: Shrink the cases, and time few runs.
        budget_s: Seconds for the timed runs of one direction.
    """

    device: torch.device
    dtype: str | None = None
    directions: tuple[str, ...] = ("forward",)
    shapes: tuple[tuple[int, int, int, int], ...] = ()
    is_quick: bool = False
    budget_s: float = 0.25

    def apply(self, cases: Sequence[Case]) -> list[Case]:
        """Return the cases as they are to be measured, without repetitions."""
        is_small = self.is_quick or self.device.type == "cpu"
        chosen: list[Case] = []
        for case in cases:
            directions = tuple(direction for direction in self.directions if direction in case.directions)
            dtype = self.dtype or ("float32" if self.device.type == "cpu" else case.dtype)
            wanted = dataclasses.replace(case, directions=directions, dtype=dtype)
            if self.shapes:
                chosen += [wanted.with_shape(shape) for shape in self.shapes]
            else:
                chosen.append(wanted.shrunk() if is_small else wanted)
        unique: dict[Case, Case] = {}
        for case in chosen:
            if case.directions:
                # given shapes make cases equal but for their names; the first name stays
                unique.setdefault(dataclasses.replace(case, name=""), case)
        return list(unique.values())


def bench_module(spec: BackendSpec) -> ModuleType | None:
    """Return the module `bench` next to the module of a backend, or None if there is none."""
    module = spec.target.partition(":")[0]
    package = module.rpartition(".")[0]
    if not package or find_spec(f"{package}.bench") is None:
        return None
    return importlib.import_module(f"{package}.bench")


def cases_of(spec: BackendSpec, module: ModuleType | None) -> Sequence[Case]:
    """Return the cases of a backend: those of its module, else dense ones if it is exact, else none.

    Raises:
        PluginApiError: The module breaks the convention of `attnmux.bench`.
    """
    if module is None:
        return DENSE_CASES if spec.capabilities.exactness == "exact" else ()
    cases = getattr(module, "CASES", None)
    if not isinstance(cases, Mapping) or not callable(getattr(module, "prepare", None)):
        raise PluginApiError(
            f"{module.__name__} must define CASES, a mapping from backend names to cases, and prepare(backend, case, "
            f"device); CASES is a {type(cases).__name__}"
        )
    found: Sequence[Case] = cases.get(spec.name, ())
    if wrong := [case for case in found if not isinstance(case, Case)]:
        raise PluginApiError(
            f"{module.__name__}.CASES[{spec.name!r}] must hold attnmux.bench.Case objects, got {wrong[0]!r}"
        )
    return found


def run_backend(
    name: str,
    options: BenchOptions,
    environment: Environment,
    *,
    cases: Sequence[Case] | None = None,
    prepare: Callable[[str, Case, torch.device], Prepared] | None = None,
    clock: Clock | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one backend, each as soon as it is measured.

    A case that the backend cannot serve, gets wrong or breaks on is a row with the reason; the others go on.

    Args:
        name: Backend name or alias, in any case.
        options: How to measure.
        environment: Where.
        cases: What to measure; None = the backend's own cases.
        prepare: Makes what a case needs; None = that of the backend's module.
        clock: Times it; None = the one of the device.

    Raises:
        UnknownBackendError: The name is neither known nor discovered.
    """
    registry = get_registry()
    name = registry.resolve(name)
    if name == AttentionBackendEnum.NO_ATTENTION.value:
        yield from _not_measured(name, options, environment, "it has no kernel: its forward raises")
        return
    clock = make_clock(options.device) if clock is None else clock
    try:
        spec = registry.spec(name)
        # what is missing is told before the module with the cases is imported
        registry.backend_class(name)
        module = registry.guard(registry.records()[name].claim, name, "bench", partial(bench_module, spec))
        if isinstance(module, LoadFailure):
            reason = f"its module with the cases raised {module.cause}"
            yield from _not_measured(name, options, environment, reason, has_failed=True)
            return
        wanted = options.apply(cases_of(spec, module) if cases is None else cases)
    except AttnmuxError as error:
        yield from _not_measured(name, options, environment, str(error), has_failed=isinstance(error, PluginLoadError))
        return
    if not wanted:
        reason = (
            f"there are no cases for it: it is not exact, and {spec.target.partition(':')[0].rpartition('.')[0]}.bench "
            "does not exist or has none; see attnmux.bench"
        )
        yield from _not_measured(name, options, environment, reason)
    prepare = prepare or getattr(module, "prepare", None)
    for case in wanted:
        # one by one: a backend without a backward pass still has a forward pass
        for direction in case.directions:
            single = dataclasses.replace(case, directions=(direction,))
            yield from _run_case(spec, single, options, environment, clock, prepare)


def _not_measured(
    name: str, options: BenchOptions, environment: Environment, reason: str, *, has_failed: bool = False
) -> list[dict[str, Any]]:
    """Rows of a backend of which no case is measured."""
    case = Case(name="none", S_q=1, H=1, D=1, dtype=options.dtype or "float32", directions=options.directions)
    gate: Literal["failed", "not run"] = "failed" if has_failed else "not run"
    return refused_rows(case, environment, backend=name, gate=gate, refused=reason)


def _run_case(
    spec: BackendSpec,
    case: Case,
    options: BenchOptions,
    environment: Environment,
    clock: Clock,
    prepare: Callable[[str, Case, torch.device], Prepared] | None,
) -> list[dict[str, Any]]:
    registry = get_registry()
    try:
        selection = select_backend(_request(case, options.device), backend=spec.name)
    except AttnmuxError as error:
        return refused_rows(case, environment, backend=spec.name, refused=error.reasons_about(spec.name))
    engine = selection.engine

    def measured() -> list[dict[str, Any]]:
        prepared = Prepared(DensePattern(case)) if prepare is None else prepare(spec.name, case, options.device)
        workload = _layer_workload(spec, case, engine, prepared, options.device)
        return list(measure_workload(workload, clock, environment, device=options.device, budget_s=options.budget_s))

    # whatever a backend raises is recorded, and the others go on
    result = registry.guard(registry.records()[spec.name].claim, spec.name, "bench", measured)
    if not isinstance(result, LoadFailure):
        rows: list[dict[str, Any]] = result
        return rows
    # a refusal is an answer, anything else is a fault
    is_refusal = isinstance(result.error, UnsupportedRequestError)
    return refused_rows(
        case,
        environment,
        backend=spec.name,
        engine=engine,
        gate="not run" if is_refusal else "failed",
        refused=str(result.error) if is_refusal else f"it raised {result.cause}",
    )


def _request(case: Case, device: torch.device) -> AttentionRequest:
    return AttentionRequest(
        head_size=case.D,
        dtype=case.dtype,
        device=str(device),
        causal=case.causal,
        num_heads=case.H,
        num_kv_heads=case.H_kv,
        needs_backward="backward" in case.directions,
        cross_attention=case.S_q != case.S_k,
    )


def _layer_workload(spec: BackendSpec, case: Case, engine: str, prepared: Prepared, device: torch.device) -> Workload:
    layer = LocalAttention(
        case.H,
        case.D,
        num_kv_heads=case.H_kv,
        causal=case.causal,
        backend=spec.name,
        dtype=getattr(torch, case.dtype),
        **prepared.impl_args,
    ).to(device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = layer(q, k, v, attn_metadata=prepared.attn_metadata, **prepared.extra_inputs)
        return output

    return Workload(
        case=case, backend=spec.name, engine=engine, attend=attend, pattern=prepared.pattern, limit=prepared.limit
    )
