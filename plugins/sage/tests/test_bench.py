import dataclasses

import pytest
import torch

from attnmux.bench import describe_environment, make_clock, measure_workload
from attnmux.bench.workload import Workload
from attnmux.layers import LocalAttention
from attnmux_sage.bench import CASES, prepare

CPU = torch.device("cpu")


def measured(backend, prepared, case):
    layer = LocalAttention(case.H, case.D, backend=backend, **prepared.impl_args)
    workload = Workload(
        case=case,
        backend=backend,
        engine="",
        attend=lambda q, k, v: layer(q, k, v, attn_metadata=prepared.attn_metadata),
        pattern=prepared.pattern,
        limit=prepared.limit,
    )
    (row,) = measure_workload(workload, make_clock(CPU), describe_environment(CPU, commit=""), device=CPU, budget_s=0.0)
    return row


@pytest.mark.parametrize("backend", CASES)
def test_eight_bits_pass_the_gate_and_other_blocks_do_not(backend):
    case = dataclasses.replace(CASES[backend][0].shrunk(), S_q=700, S_k=700, dtype="float32")
    if backend == "SAGE_SLA_ATTN":
        case = dataclasses.replace(case, keep=0.3)
    prepared = prepare(backend, case, CPU)
    assert measured(backend, prepared, case)["gate"] == "green"
    other = prepare("SAGE_SLA_ATTN", dataclasses.replace(case, block_q=128, block_k=64, keep=0.5), CPU)
    assert measured(backend, dataclasses.replace(prepared, pattern=other.pattern), case)["gate"] != "green"


@pytest.mark.parametrize("backend", CASES)
def test_no_backward_is_asked_for(backend):
    assert {case.directions for case in CASES[backend]} == {("forward",)}
