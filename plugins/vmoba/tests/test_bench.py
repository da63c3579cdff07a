import dataclasses

import pytest
import torch

from attnmux.bench import describe_environment, make_clock, measure_workload
from attnmux.bench.workload import Workload
from attnmux.errors import UnsupportedRequestError
from attnmux.layers import LocalAttention
from attnmux_vmoba.bench import CASES, LAYERS, describe, prepare

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES["VMOBA_ATTN"], ids=lambda case: f"{case.name}-{case.lists}")
def test_the_gate_knows_which_chunks_the_bench_inputs_choose(case):
    case = dataclasses.replace(case.shrunk(), dtype="float32", directions=("forward",))
    prepared = prepare("VMOBA_ATTN", case, CPU)
    layer = LocalAttention(case.H, case.D, backend="VMOBA_ATTN", prefix="blocks.0")
    workload = Workload(
        case=case,
        backend="VMOBA_ATTN",
        engine="",
        attend=lambda q, k, v: layer(q, k, v, attn_metadata=prepared.attn_metadata),
        pattern=prepared.pattern,
    )
    (row,) = measure_workload(workload, make_clock(CPU), describe_environment(CPU, commit=""), device=CPU, budget_s=0.0)
    assert row["gate"] == "green"
    assert prepared.pattern.pairs() < case.H * case.S_q * case.S_k


@pytest.mark.parametrize("case", CASES["VMOBA_ATTN"][:3], ids=lambda case: case.name)
def test_a_case_has_the_chunks_that_its_share_counts_on(case):
    kind = case.name.removeprefix("vmoba_")
    chunks = describe(case).chunks[list(LAYERS).index(kind)]
    assert (chunks.length, chunks.num_chunks) == (case.S_q, LAYERS[kind][1])


def test_an_unknown_case_is_refused():
    with pytest.raises(UnsupportedRequestError, match="'dense' is not one of"):
        describe(dataclasses.replace(CASES["VMOBA_ATTN"][0], name="dense"))
