"""Measured times behind a correctness gate: what `attnmux bench` runs, for scripts and plugins.

A plugin supplies cases in the module `bench` next to its backend's module (backend `acme_attn.backend:AcmeBackend`, cases
`acme_attn.bench`), which is found by that name and imported only when something is measured:

    CASES: Mapping[str, Sequence[Case]]                        cases of each backend, by its name
    prepare(backend: str, case: Case, device) -> Prepared      metadata and pattern of one case
"""

from attnmux.bench.cases import DENSE_CASES, Case, parse_shape
from attnmux.bench.gate import DensePattern, GateReport, Pattern, check_samples
from attnmux.bench.harness import Clock, CpuClock, CudaClock, Timing, make_clock, measure
from attnmux.bench.record import ROW_KEYS, Environment, describe_environment, read_rows, write_rows
from attnmux.bench.runner import BenchOptions, Prepared, run_backend
from attnmux.bench.workload import Workload, measure_workload, refused_rows

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
    "make_clock",
    "measure",
    "measure_workload",
    "parse_shape",
    "read_rows",
    "refused_rows",
    "run_backend",
    "write_rows",
]
