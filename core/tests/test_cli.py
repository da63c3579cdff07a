"""The command line: what it prints, what it imports, how it exits."""

import json
import subprocess
import sys
import types

import pytest

from attnmux import Reason, hookimpl
from attnmux.cli import main
from attnmux.registry import PLUGINS_GROUP, get_registry

ROW_KEYS = {"name", "distribution", "version", "status", "summary", "reason"}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def run_json(capsys):
    def run(*arguments, status=0):
        assert main([*arguments, "--json"]) == status
        return json.loads(capsys.readouterr().out)

    return run


def listed(run_json):
    return {row["name"]: row for row in run_json("list")["backends"]}


def fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- main


def test_no_arguments_is_a_usage_error_with_help(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    for command in ("list", "explain", "doctor", "check", "demo"):
        assert command in printed.out + printed.err


def test_unknown_command_is_a_usage_error(capsys):
    assert main(["frobnicate"]) == 2
    assert "No such command" in capsys.readouterr().err


def test_unknown_option_is_a_usage_error(capsys):
    assert main(["list", "--frobnicate"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_missing_argument_is_a_usage_error():
    assert main(["check"]) == 2


@pytest.mark.parametrize("command", ["list", "explain", "doctor", "check", "demo"])
def test_every_command_has_help_and_json(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_version_is_printed(capsys):
    from attnmux import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"attnmux {__version__}\n"


def test_error_is_one_paragraph_without_traceback(capsys):
    assert main(["explain", "--backend", "TORCH_SPDA"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: unknown attention backend 'TORCH_SPDA'")
    assert "Did you mean TORCH_SDPA" in printed.err
    assert "Traceback" not in printed.err
    assert printed.err.count("\n") == 1


def test_error_as_json_is_data_on_stdout(run_json):
    error = run_json("explain", "--backend", "TORCH_SPDA", status=1)["error"]
    assert error["type"] == "UnknownBackendError"
    assert "Did you mean TORCH_SDPA" in error["message"]


@pytest.mark.parametrize("arguments", [["--debug", "check", "NOPE_ATTN"], ["check", "NOPE_ATTN", "--debug"]])
def test_debug_raises_wherever_it_stands(arguments):
    from attnmux import UnknownBackendError

    with pytest.raises(UnknownBackendError, match="NOPE_ATTN"):
        main(arguments)


def test_unexpected_error_names_its_type(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("nobody expects this")

    monkeypatch.setattr("attnmux.cli.list_command.backend_rows", broken)
    assert main(["list"]) == 1
    assert "unexpected ZeroDivisionError: nobody expects this" in capsys.readouterr().err


def test_module_runs_like_the_script():
    done = subprocess.run(
        [sys.executable, "-m", "attnmux", "list", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "TORCH_SDPA" in {row["name"] for row in json.loads(done.stdout)["backends"]}


# ---- list


def test_list_imports_neither_torch_nor_a_backend():
    modules = fresh_process(
        "import sys\nfrom attnmux.cli import main\nassert main(['list', '--json']) == 0\nprint('MODULES', *sys.modules)"
    ).partition("MODULES")[2]
    loaded = set(modules.split())
    assert "attnmux.backends.plugin" in loaded
    assert not {"torch", "numpy", "triton", "matplotlib", "attnmux.backend", "attnmux.backends.sdpa"} & loaded
    assert not [name for name in loaded if name.startswith("attnmux_") and name.endswith(".backend")]


def test_list_is_fast():
    code = (
        "import time\nstarted = time.process_time()\nfrom attnmux.cli import main\nmain(['list', '--json'])\n"
        "print('SECONDS', time.process_time() - started)"
    )
    # processor time, because other programs may keep the machine busy
    assert min(float(fresh_process(code).rpartition("SECONDS")[2]) for _ in range(3)) < 0.5


def test_list_rows_have_the_contracts_keys(run_json):
    rows = run_json("list")["backends"]
    assert all(set(row) == ROW_KEYS for row in rows)
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert "NO_ATTENTION" not in {row["name"] for row in rows}


def test_list_names_the_core(run_json):
    row = listed(run_json)["TORCH_SDPA"]
    assert (row["distribution"], row["status"], row["reason"]) == ("attnmux", "available", "")
    assert "scaled dot-product" in row["summary"]


def test_missing_backend_is_listed_with_its_pip_command(run_json, monkeypatch):
    monkeypatch.setattr(get_registry(), "records", lambda environment=None: {})
    row = listed(run_json)["VMOBA_ATTN"]
    assert row["status"] == "not_installed"
    assert row["reason"] == "pip install attnmux-vmoba"
    assert row["version"] == ""


def test_broken_plugin_is_listed_as_failed(run_json, install):
    install("BROKEN_ATTN", result=RuntimeError("no luck today"))
    install("SOUND_ATTN", distribution="acme-sound")
    rows = listed(run_json)
    assert rows["BROKEN_ATTN"]["status"] == "failed"
    assert "no luck today" in rows["BROKEN_ATTN"]["reason"]
    assert rows["SOUND_ATTN"]["status"] == "available"


def test_plugin_that_exits_is_listed_as_failed(run_json, install):
    install("QUITTER_ATTN", result=SystemExit(3))
    assert listed(run_json)["QUITTER_ATTN"]["status"] == "failed"


def test_conflict_is_listed_with_both_owners(run_json, install):
    install("ALPHA_ATTN", distribution="acme-one")
    install("ALPHA_ATTN", distribution="acme-two")
    row = listed(run_json)["ALPHA_ATTN"]
    assert row["status"] == "conflict"
    assert row["distribution"] == "acme-one and acme-two"
    assert "neither is used" in row["reason"]


def test_disabled_backend_names_the_variable(run_json, install, monkeypatch):
    install("ALPHA_ATTN", distribution="acme-alpha")
    monkeypatch.setenv("ATTNMUX_DISABLE_PLUGINS", "acme-alpha")
    row = listed(run_json)["ALPHA_ATTN"]
    assert row["status"] == "disabled"
    assert "ATTNMUX_DISABLE_PLUGINS=acme-alpha" in row["reason"]


def test_missing_requirement_is_listed_as_unavailable(run_json, install):
    install("ALPHA_ATTN", requires=("no-such-distribution>=3",))
    row = listed(run_json)["ALPHA_ATTN"]
    assert row["status"] == "unavailable"
    assert "no-such-distribution>=3" in row["reason"]


def test_list_does_not_import_a_probe(run_json, install):
    install("ALPHA_ATTN", probe="a_module_that_is_not_there:probe")
    assert listed(run_json)["ALPHA_ATTN"]["status"] == "available"
    assert get_registry().failures == []


def test_what_a_plugin_prints_stays_out_of_the_json(run_json, install):
    def load():
        print("hello from the plugin")
        raise RuntimeError("and goodbye")

    install("CHATTY_ATTN", result=load)
    assert listed(run_json)["CHATTY_ATTN"]["status"] == "failed"


def test_list_table_keeps_brackets(capsys, install):
    install("ALPHA_ATTN", summary="needs pip install 'acme[gpu]'")
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "pip install 'acme[gpu]'" in printed
    assert "acme-alpha 1.0" in printed


# ---- explain


def test_explain_prints_the_report_as_data(run_json):
    report = run_json("explain", "--device", "cpu", "--dtype", "float32", "--head-size", "64", "--causal")
    assert set(report) == {"request", "source", "candidates"}
    assert report["request"]["causal"] is True
    chosen = [row for row in report["candidates"] if row["status"] == "selected"]
    assert [row["backend"] for row in chosen] == ["TORCH_SDPA"]


def test_explain_options_reach_the_request(run_json):
    options = (
        "--num-heads 8 --num-kv-heads 2 --train --lse --cross --mask bool --softmax-scale 0.5 --compile --role text"
    )
    request = run_json("explain", "--device", "cpu", "--dtype", "float32", *options.split())["request"]
    assert (request["num_heads"], request["num_kv_heads"], request["softmax_scale"]) == (8, 2, 0.5)
    assert all(request[name] for name in ("needs_backward", "needs_lse", "cross_attention", "compile"))
    assert (request["mask"], request["role"]) == ("bool", "text")


def test_explain_says_which_strategies_a_backend_takes(capsys):
    several = ["explain", "--device", "cpu", "--dtype", "float32", "--sp-size", "4", "--sp-strategy"]
    assert main([*several, "ring"]) == 0
    text = capsys.readouterr().out
    assert "sp_size=4, sp_strategy=ring" in " ".join(text.split()) and "TORCH_SDPA" in text
    assert main([*several, "magic"]) == 1
    assert "sp_strategy='magic' is unknown; expected one of ulysses, ring, usp, allgather_kv" in " ".join(
        capsys.readouterr().err.split()
    )


def test_explain_prints_a_table(capsys):
    assert main(["explain", "--device", "cpu", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "selected: TORCH_SDPA (automatic choice)" in printed
    assert "its kernel for cpu" in printed


def test_named_backend_that_cannot_serve_is_explained_and_fails(capsys, install):
    install("ALPHA_ATTN")
    assert main(["explain", "--backend", "ALPHA_ATTN", "--device", "cpu", "--dtype", "float16", "--causal"]) == 1
    printed = capsys.readouterr()
    assert "dtype=float16 (supported: bfloat16, float32)" in printed.out
    assert "causal attention (not supported)" in printed.out
    assert "error: attention backend 'ALPHA_ATTN' cannot serve this request" in printed.err


def test_refusal_as_json_is_the_report(run_json, install):
    install("ALPHA_ATTN")
    report = run_json("explain", "--backend", "ALPHA_ATTN", "--device", "cpu", "--dtype", "float16", status=1)
    assert report["source"] == "argument"
    assert next(row for row in report["candidates"] if row["backend"] == "ALPHA_ATTN")["status"] == "rejected"


def test_request_that_nobody_serves_fails_once_in_print(capsys):
    assert main(["explain", "--device", "cpu", "--dtype", "float8"]) == 1
    printed = capsys.readouterr()
    assert "selected: none (automatic choice)" in printed.out
    assert printed.err == ""


def test_impossible_request_is_refused(capsys):
    assert main(["explain", "--head-size", "0"]) == 1
    assert "head_size must be an integer >= 1, got 0" in capsys.readouterr().err


# ---- doctor


def test_doctor_is_content_with_sound_plugins(run_json, install):
    install("ALPHA_ATTN")
    diagnosis = run_json("doctor")
    assert set(diagnosis) == {"versions", "environment", "plugins", "conflicts", "failures"}
    assert diagnosis["conflicts"] == diagnosis["failures"] == []
    alpha = next(plugin for plugin in diagnosis["plugins"] if plugin["distribution"] == "acme-alpha")
    assert alpha["version"] == "1.0"
    assert alpha["backends"] == [{"name": "ALPHA_ATTN", "status": "available", "reason": ""}]


def test_doctor_reports_versions(run_json):
    import torch

    from attnmux import __version__

    versions = run_json("doctor")["versions"]
    assert versions["attnmux"] == __version__
    assert versions["torch"] == torch.__version__
    assert {"python", "triton", "cuda", "driver", "gpus"} <= set(versions)


def test_doctor_shows_the_traceback_of_every_failure(run_json, install):
    def broken_module():
        raise ImportError("libsomething.so.3 is missing")

    install("BROKEN_ATTN", distribution="acme-broken", version="2.5", result=broken_module)
    install("ODD_ATTN", distribution="acme-odd", result=42)
    failures = {failure["name"]: failure for failure in run_json("doctor", status=1)["failures"]}
    broken = failures["BROKEN_ATTN"]
    assert (broken["distribution"], broken["version"], broken["phase"]) == ("acme-broken", "2.5", "import")
    assert broken["error"] == "ImportError: libsomething.so.3 is missing"
    assert "in broken_module" in broken["traceback"]
    assert "not an attnmux.BackendSpec" in failures["ODD_ATTN"]["error"]


def test_doctor_loads_backend_modules(run_json, install):
    install("ALPHA_ATTN", target="a_module_that_is_not_there:Backend")
    diagnosis = run_json("doctor", status=1)
    (failure,) = diagnosis["failures"]
    assert failure["phase"] == "backend"
    assert "a_module_that_is_not_there" in failure["error"]
    alpha = next(plugin for plugin in diagnosis["plugins"] if plugin["distribution"] == "acme-alpha")
    assert alpha["backends"][0]["status"] == "failed"


def test_doctor_finds_a_class_that_breaks_the_contract(run_json, install, make_backend):
    install("ALPHA_ATTN", backend=make_backend("BETA_ATTN"))
    (failure,) = run_json("doctor", status=1)["failures"]
    assert failure["phase"] == "contract"
    assert "get_name() is 'BETA_ATTN'" in failure["error"]


def test_doctor_runs_probes(run_json, install, monkeypatch):
    module = types.ModuleType("fake_probe_module")
    module.probe = lambda: Reason("driver", "the driver is too old")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    install("ALPHA_ATTN", probe="fake_probe_module:probe")
    diagnosis = run_json("doctor")
    alpha = next(plugin for plugin in diagnosis["plugins"] if plugin["distribution"] == "acme-alpha")
    assert alpha["backends"][0] == {"name": "ALPHA_ATTN", "status": "unavailable", "reason": "the driver is too old"}


def test_doctor_names_both_sides_of_a_conflict(run_json, install):
    install("ALPHA_ATTN", distribution="acme-one", version="1.0")
    install("ALPHA_ATTN", distribution="acme-two", version="2.0")
    (conflict,) = run_json("doctor", status=1)["conflicts"]
    assert conflict["name"] == "ALPHA_ATTN"
    assert [claim["distribution"] for claim in conflict["distributions"]] == ["acme-one", "acme-two"]


def test_doctor_reports_a_hook_that_raises(run_json, install):
    def attnmux_cli(app):
        raise RuntimeError("no commands today")

    module = types.ModuleType("fake_hooks")
    module.attnmux_cli = hookimpl(attnmux_cli)
    install("hooks", distribution="acme-hooks", result=lambda: module, group=PLUGINS_GROUP)
    (failure,) = run_json("doctor", status=1)["failures"]
    assert failure["phase"] == "hook attnmux_cli"
    assert failure["error"] == "RuntimeError: no commands today"


@pytest.mark.parametrize("variable", ["ATTNMUX_PLUGINS", "ATTNMUX_DISABLE_PLUGINS"])
def test_doctor_reports_a_listed_distribution_that_is_not_installed(variable, run_json, monkeypatch):
    monkeypatch.setenv(variable, "acme-ghost")
    entry = run_json("doctor", status=1)["environment"][variable]
    assert entry["value"] == "acme-ghost"
    assert "'acme-ghost' is not an installed distribution" in entry["problem"]


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("ATTNMUX_BACKEND", "TORCH_SPDA", "ATTNMUX_BACKEND='TORCH_SPDA'"),
        ("ATTNMUX_STRICT", "perhaps", "neither true nor false"),
        ("ATTNMUX_DIST_CHECK", "perhaps", "ATTNMUX_DIST_CHECK='perhaps' is neither true nor false"),
    ],
)
def test_doctor_reports_a_wrong_value(variable, value, problem, run_json, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert problem in run_json("doctor", status=1)["environment"][variable]["problem"]


def test_right_values_are_no_problem(run_json, monkeypatch):
    monkeypatch.setenv("ATTNMUX_BACKEND", "torch_sdpa")
    monkeypatch.setenv("ATTNMUX_STRICT", "0")
    monkeypatch.setenv("ATTNMUX_DIST_CHECK", "on")
    environment = run_json("doctor")["environment"]
    assert [entry["problem"] for entry in environment.values()] == [None] * 5


def test_doctor_prints_tables_and_tracebacks(capsys, install):
    install("BROKEN_ATTN", result=RuntimeError("no luck today"))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    for text in ("Versions", "ATTNMUX_PLUGINS", "BROKEN_ATTN", "Traceback (most recent call last)", "no luck today"):
        assert text in printed


# ---- check


def test_check_of_an_unknown_backend_is_refused(capsys):
    assert main(["check", "NOPE_ATTN"]) == 1
    assert "unknown attention backend 'NOPE_ATTN'" in capsys.readouterr().err


def test_check_without_pytest_names_the_pip_command(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert main(["check", "TORCH_SDPA"]) == 1
    assert "pip install" in capsys.readouterr().err


def check_in_fresh_process(*arguments):
    # in a process of its own: this one is a pytest run already, whose configuration would have a say
    done = subprocess.run(
        [sys.executable, "-m", "attnmux", "check", *arguments], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def test_check_of_a_sound_backend_passes():
    status, out, err = check_in_fresh_process(
        "TORCH_SDPA", "--device", "cpu", "--select", "test_names_agree or test_lse", "--json"
    )
    assert status == 0, err
    report = json.loads(out)
    assert report["ok"] is True
    assert report["backend"] == "TORCH_SDPA"
    assert report["counts"]["passed"] >= 2


def test_check_on_an_undeclared_device_is_refused():
    status, _, err = check_in_fresh_process("TORCH_SDPA", "--device", "tpu")
    assert status == 1
    assert "cannot be checked on 'tpu'" in err


def test_failed_check_prints_reason_and_hint(capsys, monkeypatch):
    from attnmux.testing.check import CheckResult, ConformanceReport

    results = [
        CheckResult("test_causal[cpu]", "failed", "values differ", "forward seems to ignore causal"),
        CheckResult("test_lse[cpu]", "skipped", "it declares no returns_lse"),
        CheckResult("test_names_agree", "passed"),
    ]
    monkeypatch.setattr(
        "attnmux.testing.run_conformance", lambda *a, **k: ConformanceReport("X_ATTN", None, results), raising=False
    )
    assert main(["check", "TORCH_SDPA"]) == 1
    printed = capsys.readouterr().out
    for text in (
        "failed: test_causal[cpu]",
        "values differ",
        "ignore causal",
        "declares no returns_lse",
        "1 passed, 1 failed",
    ):
        assert text in printed


# ---- commands of other distributions


def hook_module():
    module = types.ModuleType("fake_hooks")

    def attnmux_cli(app):
        @app.command("greet")
        def greet():
            print("good day")

    module.attnmux_cli = hookimpl(attnmux_cli)
    return module


def test_distribution_adds_a_command(capsys, install):
    install("hooks", distribution="acme-hooks", result=hook_module, group=PLUGINS_GROUP)
    assert main(["greet"]) == 0
    assert capsys.readouterr().out == "good day\n"


def test_broken_hook_does_not_break_another(capsys, install):
    def broken():
        raise RuntimeError("broken hook module")

    install("broken", distribution="acme-broken", result=broken, group=PLUGINS_GROUP)
    install("hooks", distribution="acme-hooks", result=hook_module, group=PLUGINS_GROUP)
    assert main(["greet"]) == 0
    assert capsys.readouterr().out == "good day\n"


def test_own_command_loads_no_hooks(install):
    point = install("hooks", distribution="acme-hooks", result=hook_module, group=PLUGINS_GROUP)
    assert main(["list", "--json"]) == 0
    assert point.loads == []


def test_strict_makes_a_broken_plugin_an_error_of_the_listing(install, monkeypatch, capsys):
    install("BROKEN_ATTN", distribution="broken", result=ImportError("boom"))
    assert main(["list"]) == 0
    monkeypatch.setenv("ATTNMUX_STRICT", "1")
    assert main(["list"]) == 1
    assert "boom (ATTNMUX_STRICT is set" in capsys.readouterr().err
