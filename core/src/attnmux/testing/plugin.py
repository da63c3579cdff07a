"""The pytest plugin: marks, options and skips of attnmux's tests, and what its conformance suite prints.

pytest loads this module in every run on a machine where attnmux is installed, so it imports no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

__all__: list[str] = []

_MARKS = (
    "gpu: needs a CUDA GPU; skipped without one, failed with --require-gpu",
    "multigpu(n): needs n CUDA GPUs",
    "sm(min): needs a GPU of at least this compute capability, as a number: 90",
    "distributed: starts several processes",
    "interpret: runs Triton kernels in the interpreter; needs TRITON_INTERPRET=1 in the environment",
    "slow: takes more than a few seconds",
)
_DEVIATION = "attnmux_deviation"
_SUITE = "attnmux.testing.conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("attnmux", "attention backends")
    group.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, instead of skip, tests whose GPU is missing; no green by absence",
    )
    group.addoption(
        "--attnmux-device", default=None, metavar="DEVICE", help="run the conformance suite on this device type only"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks, so that --strict-markers knows them everywhere."""
    for mark in _MARKS:
        config.addinivalue_line("markers", mark)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail a test whose hardware or environment is missing."""
    reason = _missing_hardware(item)
    if reason is not None:
        if item.config.getoption("--require-gpu"):
            pytest.fail(f"--require-gpu is given, and {reason}", pytrace=False)
        pytest.skip(reason)
    if item.get_closest_marker("interpret") and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs in the Triton interpreter only: set TRITON_INTERPRET=1 before Python starts")


def _missing_hardware(item: pytest.Item) -> str | None:
    """Return why this machine cannot run the test, or None."""
    multigpu, sm = item.get_closest_marker("multigpu"), item.get_closest_marker("sm")
    if not (multigpu or sm or item.get_closest_marker("gpu")):
        return None
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"it needs a CUDA GPU: torch {torch.__version__} is built without CUDA"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"it needs a CUDA GPU: torch {torch.__version__} sees none (CUDA_VISIBLE_DEVICES={visible!r})"
    needed = _mark_number(multigpu, "n", 2) if multigpu else 1
    if torch.cuda.device_count() < needed:
        return f"it needs {needed} CUDA GPUs: {torch.cuda.device_count()} found"
    if sm:
        major, minor = torch.cuda.get_device_capability()
        smallest = _mark_number(sm, "min", 0)
        if major * 10 + minor < smallest:
            return f"it needs compute capability sm_{smallest}: {torch.cuda.get_device_name()} is sm_{major}{minor}"
    return None


def _mark_number(mark: pytest.Mark, name: str, default: int) -> int:
    return int(mark.kwargs.get(name, mark.args[0] if mark.args else default))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failure in the conformance suite what the backend's author probably did wrong."""
    report = yield
    function: Any = getattr(item, "function", None)
    if report.failed and str(getattr(function, "__module__", "")).startswith(_SUITE) and function.__doc__:
        import inspect

        report.sections.append(("attnmux conformance", inspect.cleandoc(function.__doc__)))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print every declared deviation that was met, whatever -r says."""
    lines = sorted(
        {
            f"{report.nodeid}: {reason}"
            for report in terminalreporter.stats.get("xfailed", [])
            for key, reason in report.user_properties
            if key == _DEVIATION
        }
    )
    if lines:
        terminalreporter.section("attnmux: declared deviations from the contract")
        for line in lines:
            terminalreporter.line(line)
