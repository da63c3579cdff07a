"""`attnmux check`: the conformance suite on one backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attnmux.testing.check import ConformanceReport

__all__ = ["check"]

_OUTCOMES = ("passed", "failed", "skipped", "deviation")


def check(
    name: Annotated[str, typer.Argument(help="Backend to check.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: every one that it declares.")] = None,
    select: Annotated[str | None, typer.Option(help="Run the tests whose names match, as pytest's -k.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that a backend does what it declares, and refuses what it does not.

    Exit status 1 if a test fails, or none runs.
    """
    from attnmux.cli.output import make_console, plugin_output_to_stderr, print_json
    from attnmux.registry import get_registry

    # a wrong name is told at once, before the suite is imported
    get_registry().spec(name)
    with (
        plugin_output_to_stderr(as_json=as_json),
        make_console(stderr=True).status(f"checking {name}"),
    ):
        from attnmux.testing import run_conformance

        report = run_conformance(name, device, select=select, quiet=True)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    if report.exit_code:
        raise typer.Exit(1)


def _show(report: ConformanceReport) -> None:
    from attnmux.cli.output import make_table, plain_text, show

    counts: dict[str, dict[str, int]] = {}
    reasons: dict[str, list[str]] = {}
    for result in report.results:
        counts.setdefault(result.test, dict.fromkeys(_OUTCOMES, 0))[result.outcome] += 1
        if result.outcome in ("skipped", "deviation") and result.reason not in reasons.setdefault(result.test, []):
            reasons[result.test].append(result.reason)
    cells = [
        (test, *(str(count[outcome] or "") for outcome in _OUTCOMES), "\n".join(reasons.get(test, ())))
        for test, count in counts.items()
    ]
    title = f"Conformance of {report.backend} on {report.device or 'every device it declares'}"
    show(make_table(("test", *_OUTCOMES, "why not"), cells, title=title, right=_OUTCOMES))
    for result in report.with_outcome("failed"):
        show(plain_text(f"failed: {result.name}", "bold red"), plain_text(f"  {result.reason}"))
        if result.hint:
            show(plain_text(f"  {result.hint}", "yellow"))
    totals = ", ".join(f"{len(report.with_outcome(outcome))} {outcome}" for outcome in _OUTCOMES)
    if not report.results:
        show(plain_text(f"no test ran:\n{report.output}", "red"))
    show(plain_text(totals, "red" if report.exit_code else "green"))
