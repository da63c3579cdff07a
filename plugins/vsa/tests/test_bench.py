"""The benchmark's cases: the gate knows which tiles the inputs choose."""

import dataclasses

import pytest
import torch

from attnmux.bench import describe_environment, make_clock, measure_workload
from attnmux.bench.workload import Workload
from attnmux.errors import UnsupportedRequestError
from attnmux.layers import LocalAttention
from attnmux_vsa.bench import CASES, VIDEOS, make_tiling, prepare

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES["VIDEO_SPARSE_ATTN"][0:5:4])
def test_the_gate_knows_which_tiles_the_bench_inputs_choose(case):
    case = dataclasses.replace(case.shrunk(), keep=0.3, dtype="float32", directions=("forward",))
    prepared = prepare("VIDEO_SPARSE_ATTN", case, CPU)
    layer = LocalAttention(case.H, case.D, backend="VIDEO_SPARSE_ATTN")
    workload = Workload(
        case=case,
        backend="VIDEO_SPARSE_ATTN",
        engine="",
        attend=lambda q, k, v: layer(q, k, v, attn_metadata=prepared.attn_metadata),
        pattern=prepared.pattern,
    )
    (row,) = measure_workload(workload, make_clock(CPU), describe_environment(CPU, commit=""), device=CPU, budget_s=0.0)
    assert row["gate"] == "green"
    assert prepared.pattern.pairs() < case.H * case.S_q * case.S_k / 2


def test_a_case_has_the_grid_of_its_video():
    for video in VIDEOS[:4]:
        tiling = make_tiling(video.case(), CPU)
        assert tiling.dit_seq_shape == video.grid
        assert tiling.topk == -(-len(tiling.variable_block_sizes) // 10)


@pytest.mark.parametrize("case", CASES["VIDEO_SPARSE_ATTN"], ids=lambda case: f"{case.name}_{case.lists}")
def test_a_shrunk_case_is_not_mostly_padding(case):
    case = case.shrunk()
    tiling = make_tiling(case, CPU)
    assert tiling.total_seq_length == case.S_q
    assert tiling.token_of_slot.numel() <= 2.5 * case.S_q


def test_other_cases_are_refused():
    case = dataclasses.replace(CASES["VIDEO_SPARSE_ATTN"][0], lists="1x2x3")
    with pytest.raises(UnsupportedRequestError, match=r"case 'vsa_444' with lists='1x2x3' is not one of"):
        make_tiling(case, CPU)
