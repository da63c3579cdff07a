"""`attnmux doctor`: what is installed, and everything that is wrong with it."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from attnmux.registry import Registry

__all__ = ["diagnose", "doctor"]

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Load every plugin, each in isolation, and report versions, variables, conflicts and failures.

    Exit status 1 if a plugin fails to load, two conflict, or a variable has a problem; a backend that is not installed
    or cannot run on this machine is no failure.
    """
    from attnmux.cli.output import plugin_output_to_stderr, print_json
    from attnmux.registry import get_registry

    with plugin_output_to_stderr(as_json=as_json):
        diagnosis = diagnose(get_registry())
    if as_json:
        print_json(diagnosis)
    else:
        _show(diagnosis)
    has_problem = any(variable["problem"] for variable in diagnosis["environment"].values())
    if diagnosis["failures"] or diagnosis["conflicts"] or has_problem:
        raise typer.Exit(1)


def diagnose(registry: Registry) -> dict[str, Any]:
    """Load everything and return what was found.

    Returns:
        `{"versions", "environment", "plugins", "conflicts", "failures"}`, JSON-able.
    """
    from attnmux.cli.list_command import backend_rows

    rows = backend_rows(registry, run_probes=True)
    for row in rows:
        if row["status"] == "available":
            row.update(_loaded(registry, row["name"]))
    _call_hooks(registry)
    failures: dict[tuple[str, ...], dict[str, str]] = {}
    for failure in registry.failures:
        entry = failure.to_dict()
        failures.setdefault((entry["distribution"], entry["name"], entry["phase"], entry["error"]), entry)
    return {
        "versions": _versions(),
        "environment": _environment(registry),
        "plugins": _plugins(registry, rows),
        "conflicts": [
            {
                "name": record.name,
                "distributions": [
                    {"distribution": claim.distribution, "version": claim.version} for claim in record.enabled
                ],
                "reason": next(row["reason"] for row in rows if row["name"] == record.name),
            }
            for record in registry.records().values()
            if record.is_conflict
        ],
        "failures": list(failures.values()),
    }


def _loaded(registry: Registry, name: str) -> dict[str, str]:
    """Import a backend's module; return what changes in its row."""
    from attnmux.errors import BackendUnavailableError, PluginLoadError

    try:
        registry.backend_class(name)
    except PluginLoadError as error:
        return {"status": "failed", "reason": str(error)}
    except BackendUnavailableError as error:
        return {"status": "unavailable", "reason": str(error)}
    return {}


def _call_hooks(registry: Registry) -> None:
    """Load the hook modules, and call the one hook that needs no request."""
    from attnmux.hooks import get_hook_runner
    from attnmux.settings import read_environment

    get_hook_runner(registry, read_environment()).call("attnmux_cli", app=typer.Typer())


def _versions() -> dict[str, Any]:
    from attnmux import __version__

    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "attnmux": __version__,
        "torch": None,
        "triton": _distribution_version("triton"),
        "cuda": None,
        "driver": _driver_version(),
        "gpus": [],
    }
    try:
        import torch
    except ImportError as error:
        versions["torch"] = f"cannot be imported: {error}"
        return versions
    versions["torch"] = str(torch.__version__)
    versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            versions["gpus"].append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return versions


def _distribution_version(name: str) -> str | None:
    from importlib_metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    """Return the NVIDIA driver's version where the kernel shows it, else None."""
    try:
        text = _DRIVER_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def _environment(registry: Registry) -> dict[str, dict[str, str | None]]:
    from attnmux.settings import VARIABLES, read_environment

    values = dict(zip(VARIABLES, read_environment(), strict=True))
    return {
        name: {"value": value, "problem": None if value is None else _problem(registry, name, value)}
        for name, value in values.items()
    }


def _problem(registry: Registry, variable: str, value: str) -> str | None:
    """Return what is wrong with a variable's value, or None."""
    from attnmux.errors import AttnmuxError
    from attnmux.registry import normalized
    from attnmux.settings import ENV_BACKEND, ENV_DIST_CHECK, ENV_STRICT, read_environment

    try:
        if variable == ENV_BACKEND:
            registry.spec(registry.resolve(value, asked_by=ENV_BACKEND))
            return None
        if variable == ENV_STRICT:
            _ = read_environment().is_strict
            return None
        if variable == ENV_DIST_CHECK:
            _ = read_environment().checks_every_exchange
            return None
    except AttnmuxError as error:
        return str(error)
    installed = {normalized(name) for name in registry.distributions()}
    names = [name.strip() for name in value.split(",") if name.strip()]
    missing = [name for name in names if normalized(name) not in installed]
    if not missing:
        return None
    return (
        f"{', '.join(map(repr, missing))} is not an installed distribution with backends or hooks; installed: "
        f"{', '.join(sorted(installed))}"
    )


def _plugins(registry: Registry, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return every distribution that registers something, with its backends."""
    states = {row["name"]: row for row in rows}
    owned: dict[str, list[dict[str, str]]] = {name: [] for name in registry.distributions()}
    for record in registry.records().values():
        claims = [*record.enabled, *(claim for claim, _ in record.disabled)]
        for claim in claims:
            row = states[record.name]
            owned[claim.distribution].append({"name": record.name, "status": row["status"], "reason": row["reason"]})
    return [
        {"distribution": name, "version": version, "backends": owned[name]}
        for name, version in registry.distributions().items()
    ]


def _show(diagnosis: dict[str, Any]) -> None:
    from attnmux.cli.output import make_table, plain_text, show

    versions = {name: "not found" if value is None else value for name, value in diagnosis["versions"].items()}
    versions["gpus"] = "\n".join(versions["gpus"]) or "none visible to torch"
    show(make_table(("", "version"), list(versions.items()), title="Versions"))
    variables = diagnosis["environment"].items()
    cells = [(name, item["value"] or "(not set)", item["problem"] or "") for name, item in variables]
    show(make_table(("variable", "value", "problem"), cells, title="Environment"))
    states = [
        (f"{plugin['distribution']} {plugin['version']}", item["name"], item["status"], item["reason"])
        for plugin in diagnosis["plugins"]
        for item in plugin["backends"] or [{"name": "(hooks only)", "status": "", "reason": ""}]
    ]
    show(make_table(("distribution", "backend", "status", "reason"), states, title="Plugins"))
    for conflict in diagnosis["conflicts"]:
        show(plain_text(f"conflict: {conflict['reason']}\n", "bold red"))
    for failure in diagnosis["failures"]:
        owner = f"{failure['distribution']} {failure['version']}".strip()
        show(plain_text(f"failure: {failure['name']} of {owner} ({failure['phase']}): {failure['error']}", "bold red"))
        show(plain_text(failure["traceback"]))
    if not diagnosis["failures"] and not diagnosis["conflicts"]:
        show(plain_text("No plugin fails, none conflict.", "green"))
    sys.stdout.flush()
