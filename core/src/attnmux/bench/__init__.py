"""Measured times behind a correctness gate: what `attnmux bench` runs, for scripts and plugins.

A plugin supplies cases in the module `bench` next to its backend's module (backend `acme_attn.backend:AcmeBackend`, cases
`acme_attn.bench`), which is found by that name and imported only when something is measured:

    CASES: Mapping[str, Sequence[Case]]                        cases of each backend, by its name
    prepare(backend: str, case: Case, device) -> Prepared      metadata and pattern of one case

Names are loaded on first use: a script that measures functions of its own needs torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnmux.bench.cases import DENSE_CASES, Case, parse_shape
    from attnmux.bench.gate import DensePattern, GateReport, Pattern, check_samples
    from attnmux.bench.harness import Clock, CpuClock, CudaClock, Timing, make_clock, measure
    from attnmux.bench.record import ROW_KEYS, Environment, describe_environment, read_rows, write_rows
    from attnmux.bench.runner import BenchOptions, run_backend
    from attnmux.bench.workload import Prepared, Workload, draw_inputs, measure_workload, refused_rows

_HOMES = {
    "attnmux.bench.cases": ("DENSE_CASES", "Case", "parse_shape"),
    "attnmux.bench.gate": ("DensePattern", "GateReport", "Pattern", "check_samples"),
    "attnmux.bench.harness": ("Clock", "CpuClock", "CudaClock", "Timing", "make_clock", "measure"),
    "attnmux.bench.record": ("ROW_KEYS", "Environment", "describe_environment", "read_rows", "write_rows"),
    "attnmux.bench.runner": ("BenchOptions", "run_backend"),
    "attnmux.bench.workload": ("Prepared", "Workload", "draw_inputs", "measure_workload", "refused_rows"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DENSE_CASES",
    "ROW_KEYS",
    "BenchOptions",
    "Case",
    "Clock",
    "CpuClock",
    "CudaClock",
    "DensePattern",
    "Environment",
    "GateReport",
    "Pattern",
    "Prepared",
    "Timing",
    "Workload",
    "check_samples",
    "describe_environment",
    "draw_inputs",
    "make_clock",
    "measure",
    "measure_workload",
    "parse_shape",
    "read_rows",
    "refused_rows",
    "run_backend",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
