import dataclasses

import torch

from attnmux.bench import describe_environment, make_clock, measure_workload
from attnmux.bench.workload import Workload
from attnmux.layers import LocalAttention
from attnmux_sla.bench import CASES, prepare

CPU = torch.device("cpu")


def test_the_gate_knows_which_blocks_the_bench_inputs_choose():
    case = dataclasses.replace(
        CASES["SLA_ATTN"][0].shrunk(), S_q=700, S_k=700, keep=0.3, dtype="float32", directions=("forward",)
    )
    prepared = prepare("SLA_ATTN", case, CPU)
    layer = LocalAttention(case.H, case.D, backend="SLA_ATTN", **prepared.impl_args)
    workload = Workload(
        case=case,
        backend="SLA_ATTN",
        engine="",
        attend=lambda q, k, v: layer(q, k, v, attn_metadata=prepared.attn_metadata),
        pattern=prepared.pattern,
    )
    (row,) = measure_workload(workload, make_clock(CPU), describe_environment(CPU, commit=""), device=CPU, budget_s=0.0)
    assert row["gate"] == "green"
    assert prepared.pattern.pairs() < case.H * case.S_q * case.S_k / 2


def test_a_case_that_keeps_everything_is_dense():
    case = dataclasses.replace(CASES["SLA_ATTN"][0].shrunk(), keep=1.0)
    assert prepare("SLA_ATTN", case, CPU).pattern.pairs() == case.H * case.S_q * case.S_k
