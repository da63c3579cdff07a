"""`attnmux list`: every backend that is known or discovered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attnmux.registry import Record, Registry

__all__ = ["backend_rows", "list_backends"]


def list_backends(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the backends: who registers each, and whether it can run here.

    Imports the plugins' spec modules only: neither torch nor a backend. Status is one of available, unavailable (a
    requirement is missing), not_installed, failed (the plugin is broken), conflict (two distributions register it) and
    disabled (by a variable). With ATTNMUX_STRICT=1 a broken plugin is an error instead.
    """
    from attnmux.cli.output import make_table, plugin_output_to_stderr, print_json, show
    from attnmux.registry import get_registry
    from attnmux.settings import read_environment

    with plugin_output_to_stderr(as_json=as_json):
        get_registry().check_strict(read_environment())
        rows = backend_rows(get_registry())
    if as_json:
        print_json({"backends": rows})
        return
    cells = [
        (
            row["name"],
            row["status"],
            f"{row['distribution']} {row['version']}".strip(),
            "\n".join(filter(None, (row["summary"], row["reason"]))),
        )
        for row in rows
    ]
    show(make_table(("name", "status", "distribution", "summary"), cells))


def backend_rows(registry: Registry, *, run_probes: bool = False) -> list[dict[str, str]]:
    """Return one row per backend, in alphabetical order.

    Args:
        registry: Where to look.
        run_probes: Whether to import the modules that hold probes, to ask whether a backend can run on this machine.

    Returns:
        Dictionaries with the keys name, distribution, version, status, summary and reason.
    """
    from attnmux.spec import AttentionBackendEnum

    records = registry.records()
    # NO_ATTENTION is a placeholder for models, not something to choose
    names = sorted({*records, *AttentionBackendEnum.__members__} - {"NO_ATTENTION"})
    return [
        _installed_row(registry, records[name], run_probes=run_probes) if name in records else _missing_row(name)
        for name in names
    ]


def _missing_row(name: str) -> dict[str, str]:
    from attnmux.registry import install_command
    from attnmux.spec import AttentionBackendEnum

    return {
        "name": name,
        "distribution": AttentionBackendEnum[name].distribution,
        "version": "",
        "status": "not_installed",
        "summary": "",
        "reason": install_command(name),
    }


def _installed_row(registry: Registry, record: Record, *, run_probes: bool) -> dict[str, str]:
    from attnmux.errors import BackendUnavailableError, PluginConflictError, PluginLoadError

    row = {
        "name": record.name,
        "distribution": " and ".join(claim.distribution for claim in record.enabled) or record.claim.distribution,
        "version": "" if record.is_conflict else record.claim.version,
        "status": "available",
        "summary": "",
        "reason": "",
    }
    try:
        spec = registry.spec(record.name)
    except PluginConflictError as error:
        return {**row, "status": "conflict", "reason": str(error)}
    except BackendUnavailableError as error:
        return {**row, "status": "disabled", "reason": str(error)}
    except PluginLoadError as error:
        return {**row, "status": "failed", "reason": str(error)}
    row["summary"] = spec.summary
    obstacle = registry.obstacle(spec, run_probe=run_probes)
    if obstacle is not None:
        return {**row, "status": "unavailable", "reason": str(obstacle)}
    return row
