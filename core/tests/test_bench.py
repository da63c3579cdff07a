"""The bench harness: statistics, cases, the correctness gate, result files, tables, plots."""

import itertools
import sys

import pytest
import torch

from attnmux.bench import (
    BenchOptions,
    Case,
    CpuClock,
    DensePattern,
    Timing,
    check_samples,
    describe_environment,
    measure,
    parse_shape,
    read_rows,
    write_rows,
)
from attnmux.bench.harness import quantile
from attnmux.bench.plots import plot_rows
from attnmux.bench.record import make_row
from attnmux.bench.tables import fill_document, markdown_table
from attnmux.errors import MissingPackageError, UnsupportedRequestError
from attnmux.testing import (
    dense_attention_oracle,
    make_inputs,
)

CPU = torch.device("cpu")
TINY = Case(name="tiny", B=2, S_q=65, H=4, H_kv=2, D=16, dtype="float64")


@pytest.fixture
def environment():
    return describe_environment(CPU, commit="abc1234")


class FakeClock:
    """Every run takes a given number of milliseconds; counts the runs."""

    def __init__(self, each_ms=10.0):
        self.each_ms = each_ms
        self.asked = []

    def milliseconds(self, run, repetitions):
        self.asked.append(repetitions)
        for _ in range(repetitions):
            run()
        return [self.each_ms] * repetitions


def results_of(case, *, scale=None):
    """Inputs, output and gradients of the oracle for a case."""
    q, k, v = make_inputs(
        batch=case.B,
        length_q=case.S_q,
        length_k=case.S_k,
        num_heads=case.H,
        num_kv_heads=case.H_kv,
        head_size=case.D,
        dtype=torch.float64,
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dense_attention_oracle(*leaves, causal=case.causal, softmax_scale=scale)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    return tuple(x.detach() for x in (q, k, v, out, dout)), grads


# ---- harness


def test_timing_gives_median_and_interpolated_percentiles():
    assert Timing.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Timing(3.0, 1.8, pytest.approx(4.2), 5)


def test_timing_of_one_run_is_that_run():
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (1.0, 5.0)])
def test_quantile_interpolates(fraction, expected):
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], fraction) == expected


def test_cpu_clock_times_each_run():
    ticks = itertools.accumulate([0.0, 0.001, 1.0, 0.003])
    assert CpuClock(lambda: next(ticks)).milliseconds(lambda: None, 2) == pytest.approx([1.0, 3.0])


def test_repetitions_follow_from_the_budget():
    clock = FakeClock(each_ms=10.0)
    assert measure(lambda: None, clock, budget_s=0.5).repetitions == 50
    # the first run, the estimate, a fifth of the budget as warm-up, the timed runs
    assert clock.asked == [1, 2, 10, 50]


@pytest.mark.parametrize(("each_ms", "expected"), [(10_000.0, 3), (1e-6, 200)])
def test_repetitions_stay_within_their_limits(each_ms, expected):
    assert measure(lambda: None, FakeClock(each_ms), budget_s=0.25).repetitions == expected


# ---- cases


def test_lengths_and_heads_of_keys_default_to_those_of_queries():
    assert (Case(name="x", S_q=7, H=3).S_k, Case(name="x", S_q=7, H=3).H_kv) == (7, 3)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"S_q": 0}, "S_k must be at least 1, got 0|S_q must be at least 1, got 0"),
        ({"H_kv": 5}, "H=12 is not a multiple of H_kv=5"),
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ({"directions": ("sideways",)}, r"unknown directions \['sideways'\]"),
    ],
)
def test_case_refuses_a_field_out_of_range(field, message):
    with pytest.raises(UnsupportedRequestError, match=message):
        Case(**{"name": "x", "S_q": 8} | field)


def test_shrunk_case_keeps_the_ragged_end_and_the_group_of_heads():
    case = Case(name="x", S_q=32728, H=12, H_kv=3).shrunk()
    assert case.S_q % 128 == 32728 % 128
    assert case.H // case.H_kv == 4


def test_shrunk_cross_case_keeps_unequal_lengths():
    case = Case(name="x", S_q=32768, S_k=512).shrunk()
    assert case.S_q != case.S_k


def test_shape_keeps_the_group_of_heads_where_it_divides():
    case = Case(name="x", S_q=8, H=12, H_kv=3)
    assert case.with_shape((1, 16, 8, 32)).H_kv == 2
    assert case.with_shape((1, 16, 6, 32)).H_kv == 6


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,0", "1,2,x,4", "1,2,3,-4"])
def test_malformed_shape_is_refused(text):
    with pytest.raises(UnsupportedRequestError, match="is not B,S,H,D: four whole numbers"):
        parse_shape(text)


def test_options_measure_cases_that_a_shape_makes_equal_once_in_their_order():
    options = BenchOptions(device=CPU, shapes=((1, 65, 2, 16),))
    cases = [Case(name="a", S_q=1000), Case(name="c", S_q=1000, causal=True), Case(name="b", S_q=2000)]
    assert [case.name for case in options.apply(cases)] == ["a", "c"]


# ---- gate


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 1), (63, 65), (127, 127), (1000, 65)])
def test_gate_is_green_for_the_oracle(length_q, length_k, causal):
    case = Case(name="x", S_q=length_q, S_k=length_k, H=4, H_kv=2, D=16, causal=causal)
    (q, k, v, out, dout), grads = results_of(case)
    report = check_samples(q, k, v, out, DensePattern(case), dout=dout, grads=grads)
    assert report.problem == ""
    assert set(report.errors) == {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize("wrong", ["out", "dq", "dk", "dv"])
def test_gate_names_the_wrong_quantity(wrong):
    (q, k, v, out, dout), (dq, dk, dv) = results_of(TINY)
    found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    found[wrong] = found[wrong] * 1.001
    grads = (found["dq"], found["dk"], found["dv"])
    report = check_samples(q, k, v, found["out"], DensePattern(TINY), dout=dout, grads=grads)
    assert report.problem.startswith(f"relative L2 error of {wrong} 1.00e-03")
    assert ";" not in report.problem


def test_gate_finds_nan_outside_the_samples():
    case = Case(name="x", S_q=1000, H=1, D=16)
    (q, k, v, out, _), _ = results_of(case)
    for row in range(0, 900, 10):
        poisoned = out.clone()
        poisoned[0, row] = float("nan")
        assert "out holds NaN or infinity" in check_samples(q, k, v, poisoned, DensePattern(case)).problem


def test_gate_wants_zeros_for_a_query_with_nothing_to_attend():
    case = Case(name="x", S_q=40, S_k=8, H=1, D=16, causal=True)
    (q, k, v, out, _), _ = results_of(case)
    assert check_samples(q, k, v, out, DensePattern(case)).problem == ""
    out[:, 0] = 1.0
    assert "relative L2 error of out" in check_samples(q, k, v, out, DensePattern(case)).problem


def test_gate_honours_a_scale():
    (q, k, v, out, _), _ = results_of(TINY, scale=0.5)
    assert check_samples(q, k, v, out, DensePattern(TINY), softmax_scale=0.5).problem == ""
    assert check_samples(q, k, v, out, DensePattern(TINY)).problem != ""


def test_causal_pairs_are_those_of_the_mask():
    for length_q, length_k in ((5, 5), (5, 9), (9, 5)):
        case = Case(name="x", B=2, S_q=length_q, S_k=length_k, H=3, D=8, causal=True)
        pattern = DensePattern(case)
        visible = pattern.visible(0, 0, torch.arange(length_q), torch.arange(length_k))
        assert pattern.pairs() == 6 * int(visible.sum())


# ---- tables and plots


@pytest.fixture
def rows(environment):
    case = Case(name="dense", S_q=1024)
    common = {"backend": "OURS", "engine": "fast"}
    timing = Timing(2.0, 1.5, 2.5, 9)
    forward = make_row(case, "forward", environment, gate="green", timing=timing, pairs=10**9, **common)
    backward = make_row(case, "backward", environment, gate="failed", refused="it raised\nthings", **common)
    return [forward, backward]


def test_table_has_one_line_per_case_and_lists_what_has_no_number(rows):
    table = markdown_table(rows)
    assert "| dense |  | S=1024 H=12 D=128 | OURS (fast) | 2.000 (1.500 to 2.500) | 256 | failed |  |" in table
    assert "commit abc1234" in table
    assert "- OURS (fast), dense, backward: it raised things" in table


def test_cases_of_one_name_are_told_apart_by_what_differs(environment):
    cases = [
        Case(name="sparse", S_q=1024, keep=0.1, lists="random"),
        Case(name="sparse", S_q=1024, keep=0.2, lists="random"),
        Case(name="sparse", S_q=1024, keep=0.1, lists="sink"),
        Case(name="sparse", S_q=2048, keep=0.1, lists="random"),
    ]
    made = [
        make_row(case, "forward", environment, gate="green", timing=Timing(2.0, 1.5, 2.5, 9), backend="OURS", engine="")
        for case in cases
    ]
    names = [line.split("|")[1].strip() for line in markdown_table(made).splitlines()[2:6]]
    assert names == ["sparse, random, keep 0.1", "sparse, random, keep 0.2", "sparse, sink", "sparse"]


def test_document_sections_are_made_anew_and_the_rest_stays(tmp_path, rows):
    write_rows(tmp_path / "speed.json", rows)
    text = "before\n<!-- benchmarks: speed.json -->\nold\n<!-- /benchmarks -->\nafter\n"
    filled = fill_document(text, tmp_path)
    assert filled.startswith("before\n<!-- benchmarks: speed.json -->\n")
    assert filled.endswith("<!-- /benchmarks -->\nafter\n")
    assert "old" not in filled and "OURS (fast)" in filled
    assert fill_document(filled, tmp_path) == filled


@pytest.mark.parametrize(("cases", "is_there"), [("dense", True), ("den*, x", True), ("sparse", False)])
def test_document_section_may_name_cases(tmp_path, rows, cases, is_there):
    write_rows(tmp_path / "speed.json", rows)
    text = f"<!-- benchmarks: speed.json {cases} -->\n<!-- /benchmarks -->"
    assert ("OURS (fast)" in fill_document(text, tmp_path)) == is_there


def test_document_without_a_section_is_told(tmp_path):
    with pytest.raises(UnsupportedRequestError, match="no section for a table"):
        fill_document("nothing here", tmp_path)


def test_plot_is_a_picture(tmp_path, rows):
    pytest.importorskip("matplotlib")
    plot_rows(rows, tmp_path / "speed.png", title="speed")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_numbers_is_refused(tmp_path, rows):
    pytest.importorskip("matplotlib")
    with pytest.raises(UnsupportedRequestError, match="no row has a number"):
        plot_rows(rows[1:], tmp_path / "speed.png")


def test_plot_without_matplotlib_names_the_package(tmp_path, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'attnmux\[bench\]'"):
        plot_rows(rows, tmp_path / "speed.png")


# ---- result files


def test_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UnsupportedRequestError, match="rows.json' cannot be written"):
        write_rows(tmp_path / "missing" / "rows.json", [])


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ("{}", "not one list of rows"), ("[1]", "not one list of rows")]
)
def test_file_that_holds_no_rows_is_told(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UnsupportedRequestError, match=message):
        read_rows(tmp_path / "rows.json")
