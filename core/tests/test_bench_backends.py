"""Workloads, backends and the command `attnmux bench` on a CPU: what is right gets numbers, what is wrong gets none."""

import dataclasses
import json
import sys
import types
from contextlib import ExitStack

import pytest
import torch

from attnmux import AttentionBackendEnum, BackendSpec, Capabilities
from attnmux.bench import (
    DENSE_CASES,
    ROW_KEYS,
    BenchOptions,
    Case,
    DensePattern,
    Prepared,
    Workload,
    describe_environment,
    measure_workload,
    read_rows,
    run_backend,
    write_rows,
)
from attnmux.cli import main
from attnmux.errors import UnknownBackendError, UnsupportedRequestError
from attnmux.registry import get_registry
from attnmux.testing import (
    FAKE_CAPABILITIES,
    FakeEntryPoint,
    FakeImpl,
    dense_attention_oracle,
    installed,
    make_backend,
)

CPU = torch.device("cpu")
TINY = Case(name="tiny", B=2, S_q=65, H=4, H_kv=2, D=16, dtype="float64")
OPTIONS = BenchOptions(device=CPU, shapes=((1, 65, 2, 16),), directions=("forward", "backward"), budget_s=1e-4)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")


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


# ---- workloads and rows


def make_workload(case=TINY, attend=None, **options):
    return Workload(
        case=case,
        backend="OURS",
        engine="oracle",
        attend=attend or dense_attention_oracle,
        pattern=DensePattern(case),
        **options,
    )


def test_rows_have_the_keys_and_count_operations(environment):
    rows = list(measure_workload(make_workload(), FakeClock(2.0), environment, device=CPU))
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    for row, factor in zip(rows, (4.0, 10.0), strict=True):
        assert set(row) == set(ROW_KEYS)
        assert (row["median_ms"], row["p20_ms"], row["p80_ms"]) == (2.0, 2.0, 2.0)
        assert row["tflops"] == pytest.approx(factor * 2 * 4 * 65 * 65 * 16 / 2e-3 * 1e-12)
        assert (row["gate"], row["commit"], row["peer"]) == ("green", "abc1234", False)


def test_other_layout_gives_the_same_verdict(environment):
    def attend(q, k, v):
        assert q.shape == (2, 4, 65, 16) and k.shape == (2, 2, 65, 16)
        return dense_attention_oracle(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    rows = list(measure_workload(make_workload(attend=attend, layout="BHSD"), FakeClock(), environment, device=CPU))
    assert [row["gate"] for row in rows] == ["green", "green"]


def test_red_gate_gives_no_number(environment):
    clock = FakeClock()
    attend = lambda q, k, v: dense_attention_oracle(q, k, v) * 1.01  # noqa: E731
    rows = list(measure_workload(make_workload(attend=attend), clock, environment, device=CPU))
    for row in rows:
        assert (row["gate"], row["median_ms"], row["tflops"]) == ("red", None, None)
        assert row["refused"].startswith("the results are wrong: ")
        assert "relative L2 error of out 1.00e-02, allowed 1e-10" in row["refused"]
    assert clock.asked == []


def test_limit_of_a_workload_replaces_the_rule(environment):
    attend = lambda q, k, v: dense_attention_oracle(q, k, v) * 1.01  # noqa: E731
    rows = list(measure_workload(make_workload(attend=attend, limit=0.05), FakeClock(), environment, device=CPU))
    assert rows[0]["gate"] == "green"


def test_commit_is_that_of_the_checkout_or_unknown():
    assert describe_environment(CPU).commit.count("-") <= 1


def test_rows_survive_the_file(tmp_path, environment):
    rows = list(measure_workload(make_workload(), FakeClock(), environment, device=CPU))
    write_rows(tmp_path / "rows.json", rows)
    assert read_rows(tmp_path / "rows.json") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


# ---- backends


class WrongImpl(FakeImpl):
    def forward(self, query, key, value, attn_metadata=None, **extra_inputs):
        return super().forward(query, key, value, attn_metadata, **extra_inputs) * 1.5


class WrongGradients(FakeImpl):
    def forward(self, query, key, value, attn_metadata=None, **extra_inputs):
        output = super().forward(query, key, value, attn_metadata, **extra_inputs)
        return output.detach() + (output - output.detach()) * 1.5


class BrokenBackward(FakeImpl):
    def forward(self, query, key, value, attn_metadata=None, **extra_inputs):
        output = super().forward(query, key, value, attn_metadata, **extra_inputs)
        output.requires_grad and output.register_hook(self.burst)
        return output

    def burst(self, gradient):
        raise RuntimeError("the kernel burst")


def install(impl_cls, capabilities=FAKE_CAPABILITIES):
    spec = BackendSpec("BENCH_ATTN", target="unused:Unused", capabilities=capabilities)
    return installed(spec, make_backend("BENCH_ATTN", impl_cls))


def gates(rows):
    return {row["direction"]: row["gate"] for row in rows}


def test_right_backend_gets_numbers(environment):
    with install(FakeImpl):
        rows = list(run_backend("bench_attn", OPTIONS, environment, clock=FakeClock()))
    assert [row["case"] for row in rows] == ["dense", "dense", "dense_causal", "dense_causal"]
    assert {row["gate"] for row in rows} == {"green"}


def test_wrong_backend_gets_no_number(environment):
    with install(WrongImpl):
        rows = list(run_backend("BENCH_ATTN", OPTIONS, environment, clock=FakeClock()))
    assert rows and all(row["median_ms"] is None and "the results are wrong" in row["refused"] for row in rows)


def test_wrong_gradients_leave_the_forward_number(environment):
    with install(WrongGradients):
        rows = list(run_backend("BENCH_ATTN", OPTIONS, environment, clock=FakeClock()))
    assert gates(rows) == {"forward": "green", "backward": "red"}


def test_backend_that_breaks_is_a_row_with_the_reason(environment):
    with install(BrokenBackward):
        rows = list(run_backend("BENCH_ATTN", OPTIONS, environment, clock=FakeClock()))
    assert gates(rows) == {"forward": "green", "backward": "failed"}
    assert rows[1]["refused"] == "it raised RuntimeError: the kernel burst"


def test_case_beyond_the_capabilities_is_refused_with_the_reason(environment):
    capabilities = Capabilities(dtypes={"float32"}, head_sizes={64}, devices={"cpu"}, exactness="exact")
    with install(FakeImpl, capabilities):
        rows = list(run_backend("BENCH_ATTN", OPTIONS, environment, clock=FakeClock()))
    assert {row["gate"] for row in rows} == {"not run"}
    assert "head_size=16 (supported: 64)" in rows[0]["refused"]


def test_backend_without_gradients_still_gets_a_forward_number(environment):
    with install(FakeImpl, dataclasses.replace(FAKE_CAPABILITIES, backward=False)):
        rows = list(run_backend("BENCH_ATTN", OPTIONS, environment, clock=FakeClock()))
    assert gates(rows) == {"forward": "green", "backward": "not run"}
    assert rows[1]["refused"] == "gradients (not supported)"


def test_call_that_the_impl_refuses_is_an_answer(environment):
    class Refusing(FakeImpl):
        def forward(self, query, key, value, attn_metadata=None, **extra_inputs):
            raise UnsupportedRequestError("not on a Tuesday")

    with install(Refusing):
        rows = list(run_backend("BENCH_ATTN", OPTIONS, environment, clock=FakeClock()))
    assert {(row["gate"], row["refused"]) for row in rows} == {("not run", "not on a Tuesday")}


def test_sparse_backend_without_cases_says_where_they_belong(environment):
    capabilities = Capabilities(dtypes={"float32"}, head_sizes={16}, devices={"cpu"}, exactness="sparse")
    with install(FakeImpl, capabilities):
        rows = list(run_backend("BENCH_ATTN", OPTIONS, environment, clock=FakeClock()))
    assert [row["gate"] for row in rows] == ["not run", "not run"]
    assert "there are no cases for it" in rows[0]["refused"]


def test_unknown_backend_is_an_error(environment):
    with pytest.raises(UnknownBackendError, match="NOPE_ATTN"):
        list(run_backend("NOPE_ATTN", OPTIONS, environment))


def test_known_backend_that_is_not_installed_names_the_package(environment):
    missing = [name for name in AttentionBackendEnum.__members__ if name not in get_registry().records()]
    missing = [name for name in missing if name != "NO_ATTENTION"]
    if not missing:
        pytest.skip("every known backend is installed")
    rows = list(run_backend(missing[0], OPTIONS, environment))
    assert {row["gate"] for row in rows} == {"not run"}
    assert f"pip install {AttentionBackendEnum[missing[0]].distribution}" in rows[0]["refused"]


def test_backend_without_a_kernel_is_refused(environment):
    rows = list(run_backend("NO_ATTENTION", OPTIONS, environment))
    assert rows[0]["refused"] == "it has no kernel: its forward raises"


# ---- cases of a plugin


@pytest.fixture
def plugin_package(monkeypatch):
    """Return a function that installs a package with a backend, and a module `bench` with the given contents."""

    def make(**contents):
        package, backend, bench = (types.ModuleType(f"acme_bench{part}") for part in ("", ".backend", ".bench"))
        package.__path__ = []
        backend.Backend = make_backend("ACME_ATTN", FakeImpl)
        vars(bench).update(contents)
        bench.__spec__ = types.SimpleNamespace(name=bench.__name__)
        for module in (package, backend, bench):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return BackendSpec("ACME_ATTN", target="acme_bench.backend:Backend", capabilities=FAKE_CAPABILITIES)

    return make


@pytest.fixture
def acme(plugin_package, install_spec):
    return lambda **contents: install_spec(plugin_package(**contents))


@pytest.fixture
def install_spec():
    with ExitStack() as stack:
        yield lambda spec: stack.enter_context(
            get_registry().temporary_entry_points([FakeEntryPoint(spec.name, spec, "acme_bench.plugin:SPEC")])
        )


def test_plugin_brings_its_cases_and_what_they_need(acme, environment):
    asked = []

    def prepare(backend, case, device):
        asked.append((backend, case.name, device.type))
        return Prepared(DensePattern(case))

    acme(CASES={"ACME_ATTN": [Case(name="acme_case", S_q=64)]}, prepare=prepare)
    rows = list(run_backend("ACME_ATTN", OPTIONS, environment, clock=FakeClock()))
    assert [row["case"] for row in rows] == ["acme_case", "acme_case"]
    assert gates(rows) == {"forward": "green", "backward": "green"}
    assert set(asked) == {("ACME_ATTN", "acme_case", "cpu")}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "acme_bench.bench must define CASES, a mapping from backend names to cases"),
        ({"CASES": [], "prepare": print}, "CASES is a list"),
        ({"CASES": {"ACME_ATTN": ["dense"]}, "prepare": print}, "must hold attnmux.bench.Case objects, got 'dense'"),
    ],
)
def test_plugin_that_breaks_the_convention_is_told(acme, environment, contents, message):
    acme(**contents)
    (row, _) = run_backend("ACME_ATTN", OPTIONS, environment, clock=FakeClock())
    assert row["gate"] == "failed"
    assert message in row["refused"]


def test_plugin_whose_cases_cannot_be_imported_is_told(acme, environment, monkeypatch):
    acme()
    monkeypatch.delitem(sys.modules, "acme_bench.bench")
    finder = types.SimpleNamespace(find_spec=lambda name, path=None, target=None: burst(name))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    (row, _) = run_backend("ACME_ATTN", OPTIONS, environment, clock=FakeClock())
    assert row["gate"] == "failed"
    assert row["refused"] == "its module with the cases raised RuntimeError: no cases today"


def burst(name):
    if name == "acme_bench.bench":
        raise RuntimeError("no cases today")


# ---- command

TINY_RUN = ("bench", "--device", "cpu", "--quick", "--shape", "1,65,2,16")


def run_json(capsys, *arguments, status=0):
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_command_prints_rows_and_writes_the_same(capsys, tmp_path):
    path = tmp_path / "rows.json"
    found = run_json(capsys, *TINY_RUN, "--backend", "TORCH_SDPA", "--backward", "--output", str(path))
    assert found["ok"] is True
    assert {row["direction"] for row in found["rows"]} == {"forward", "backward"}
    assert all(set(ROW_KEYS) <= set(row) and row["median_ms"] > 0 for row in found["rows"])
    assert read_rows(path) == found["rows"]


def test_command_prints_one_table(capsys):
    assert main([*TINY_RUN, "--backend", "TORCH_SDPA"]) == 0
    printed = capsys.readouterr().out
    assert "S=65 H=2 D=16" in printed and "median ms" in printed and "backward" not in printed


def test_command_uses_the_cases_of_the_backend_without_shapes(capsys):
    found = run_json(capsys, "bench", "--device", "cpu", "--quick", "--backend", "TORCH_SDPA")
    assert {row["case"] for row in found["rows"]} == {case.name for case in DENSE_CASES}
    assert all(row["S"] < 600 and row["dtype"] == "float32" for row in found["rows"])


def test_command_fails_for_a_wrong_backend(capsys):
    with install(WrongImpl):
        found = run_json(capsys, *TINY_RUN, "--backend", "BENCH_ATTN,TORCH_SDPA", status=1)
    assert found["ok"] is False
    assert {(row["backend"], row["gate"]) for row in found["rows"]} == {("BENCH_ATTN", "red"), ("TORCH_SDPA", "green")}


def test_command_shows_why_there_is_no_number(capsys):
    with install(WrongImpl):
        assert main([*TINY_RUN, "--backend", "BENCH_ATTN"]) == 1
    printed = capsys.readouterr().out
    assert "the results are wrong: relative L2 error of out" in printed
    assert "red: BENCH_ATTN" in printed


def test_command_fails_for_a_named_backend_that_cannot_run(capsys):
    capabilities = Capabilities(dtypes={"float32"}, head_sizes={64}, devices={"cpu"}, exactness="exact")
    with install(FakeImpl, capabilities):
        found = run_json(capsys, *TINY_RUN, "--backend", "BENCH_ATTN,TORCH_SDPA", status=1)
    assert {row["gate"] for row in found["rows"]} == {"not run", "green"}


def test_command_refuses_an_unknown_backend(capsys):
    found = run_json(capsys, *TINY_RUN, "--backend", "NOPE_ATTN", status=1)
    assert found["error"]["type"] == "UnknownBackendError"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "1,2"), "is not B,S,H,D"),
        (("--dtype", "int8"), "--dtype 'int8' is not a dtype of attention"),
        (("--device", "abacus"), "--device 'abacus' is not a device"),
        (("--output", "nowhere/rows.json"), "the folder of --output 'nowhere/rows.json' does not exist"),
    ],
)
def test_command_refuses_arguments_that_make_no_sense(capsys, arguments, message):
    found = run_json(capsys, "bench", "--backend", "TORCH_SDPA", *arguments, status=1)
    assert message in found["error"]["message"]
