"""Runs the conformance suite on one backend from Python, as `attnmux check` does."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnmux.errors import BackendUnavailableError, PluginApiError, UnsupportedRequestError
from attnmux.registry import get_registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnmux.testing.conformance import BackendConformance

__all__ = ["CheckResult", "ConformanceReport", "conformance_class", "run_conformance"]


@dataclass(frozen=True)
class CheckResult:
    """One test of the suite.

    Attributes:
        name: Test with its parameters: "test_causal[1-cpu-float64]".
        outcome: "passed", "failed", "skipped" or "deviation" (declared, and failing as declared).
        reason: Why it was skipped, the declared reason, or the failure's message; empty if it passed.
        hint: For a failure, what the backend's author probably did wrong.
    """

    name: str
    outcome: str
    reason: str = ""
    hint: str = ""

    @property
    def test(self) -> str:
        """Name of the test without its parameters."""
        return self.name.partition("[")[0]

    def to_dict(self) -> dict[str, str]:
        """Return the fields as plain data."""
        return {"name": self.name, "outcome": self.outcome, "reason": self.reason, "hint": self.hint}


@dataclass
class ConformanceReport:
    """What the suite found.

    Attributes:
        backend: Name of the backend.
        device: Device type that was asked for, or None for every one it declares.
        results: One entry per test.
        exit_code: 0 if no test failed and at least one ran, else 1.
        output: What pytest printed, empty if it went to the terminal.
    """

    backend: str
    device: str | None = None
    results: list[CheckResult] = field(default_factory=list)
    exit_code: int = 1
    output: str = ""

    def with_outcome(self, outcome: str) -> list[CheckResult]:
        """Return the results with this outcome."""
        return [result for result in self.results if result.outcome == outcome]

    @property
    def failed_tests(self) -> set[str]:
        """Names of the tests that failed with some parameters."""
        return {result.test for result in self.with_outcome("failed")}

    def to_dict(self) -> dict[str, Any]:
        """Return `{"backend", "device", "ok", "counts", "results"}` as plain data."""
        outcomes = ("passed", "failed", "skipped", "deviation")
        return {
            "backend": self.backend,
            "device": self.device,
            "ok": self.exit_code == 0,
            "counts": {outcome: len(self.with_outcome(outcome)) for outcome in outcomes},
            "results": [result.to_dict() for result in self.results],
        }


def conformance_class(name: str) -> type[BackendConformance]:
    """Return the suite for a backend: the class its `get_conformance_cls()` gives, else the generic one.

    Raises:
        AttnmuxError: The backend is unknown, not installed, or cannot be loaded.
        PluginApiError: `get_conformance_cls()` gives something else than a suite for this backend.
    """
    from attnmux.testing.conformance import BackendConformance

    spec = get_registry().spec(name)
    found = get_registry().backend_class(spec.name).get_conformance_cls()
    if found is None:
        return type("GenericConformance", (BackendConformance,), {"backend": spec.name})
    if not (isinstance(found, type) and issubclass(found, BackendConformance)) or found.backend != spec.name:
        raise PluginApiError(
            f"{spec.target}: get_conformance_cls() gives {found!r}, expected a subclass of "
            f"attnmux.testing.BackendConformance with backend = {spec.name!r}"
        )
    return found


class _Collector:
    """A pytest plugin that turns reports into results."""

    def __init__(self) -> None:
        self.results: list[CheckResult] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("::")[2]
        if hasattr(report, "wasxfail") and report.skipped:
            self.results.append(CheckResult(name, "deviation", report.wasxfail.removeprefix("reason: ")))
        elif report.failed:
            hint = "\n".join(text for title, text in report.sections if title == "attnmux conformance")
            self.results.append(CheckResult(name, "failed", _message(report), hint))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.results.append(CheckResult(name, "skipped", reason.removeprefix("Skipped: ")))
        elif report.when == "call":
            self.results.append(CheckResult(name, "passed"))


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)


def run_conformance(
    name: str,
    device: str | None = None,
    *,
    conformance_cls: type[BackendConformance] | None = None,
    select: str | None = None,
    quiet: bool = False,
    extra_args: Sequence[str] = (),
) -> ConformanceReport:
    """Run the suite on one backend in this process and return what it found.

    Args:
        name: Backend name or alias, in any case.
        device: Device type, "cpu" or "cuda"; missing hardware then fails instead of skips. None = every declared one.
        conformance_cls: The suite; None = `conformance_class(name)`.
        select: pytest's -k expression, to run a part of the suite.
        quiet: Keep what pytest prints in the report instead of printing it.
        extra_args: Further arguments for pytest.

    Raises:
        BackendUnavailableError: pytest is not installed, or the backend cannot run here.
        UnsupportedRequestError: The backend does not declare the device.
        AttnmuxError: See `conformance_class`.
    """
    try:
        import pytest
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend {name!r} cannot be checked without pytest. Run: pip install pytest"
        ) from error

    suite = conformance_cls or conformance_class(name)
    spec = get_registry().spec(name)
    device = None if device is None else device.partition(":")[0]
    if device is not None and device not in spec.capabilities.devices:
        raise UnsupportedRequestError(
            f"{spec.name} cannot be checked on {device!r}: it declares {', '.join(sorted(spec.capabilities.devices))}"
        )
    collector = _Collector()
    options = [
        "-q",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
        "--strict-markers",
        "--tb=short",
        *_WARNINGS,
        *extra_args,
    ]
    if device is not None:
        options += ["--attnmux-device", device, "--require-gpu"]
    if select is not None:
        options += ["-k", select]
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        # an own configuration file, so that a project's in the current directory has no say
        configuration = Path(folder, "pytest.ini")
        configuration.write_text("[pytest]\n")
        # a name of its own: pytest takes a module that is loaded already instead of the file
        module = Path(folder, f"test_{spec.name.lower()}_{Path(folder).name}.py")
        module.write_text(_MODULE)
        token = _under_check.set(suite)
        try:
            with contextlib.redirect_stdout(printed) if quiet else contextlib.nullcontext():
                status = int(pytest.main([*options, "-c", str(configuration), str(module)], plugins=[collector]))
        finally:
            _under_check.reset(token)
            sys.modules.pop(module.stem, None)
    ran = any(result.outcome == "passed" for result in collector.results)
    exit_code = 0 if status == 0 and ran else 1
    return ConformanceReport(spec.name, device, collector.results, exit_code, printed.getvalue())


_under_check: ContextVar[type[BackendConformance]] = ContextVar("attnmux_suite_under_check")

# the suite is imported before this run of pytest could rewrite its assertions; they carry messages of their own
_WARNINGS = ("-W", "ignore::pytest.PytestAssertRewriteWarning")

_MODULE = """
from attnmux.testing.check import suite_under_check

TestConformance = suite_under_check()
"""


def suite_under_check() -> type[BackendConformance]:
    """Return the suite that `run_conformance` is running, for the module that pytest collects."""
    return _under_check.get()
