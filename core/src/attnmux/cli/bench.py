"""`attnmux bench`: times of backends behind a correctness gate."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotation
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["bench"]

_QUICK_BUDGET_S, _BUDGET_S = 0.02, 0.25


def bench(
    backends: Annotated[
        list[str] | None, typer.Option("--backend", help="Only these; repeat, or separate by commas.")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="B,S,H,D in place of the cases' own; repeat for several.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16, float32 or float64; default: the case's, float32 on a CPU.")
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Measure gradients too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and few runs.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: CUDA if there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write the rows to, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how long backends take, after a check that what they compute is right.

    Sampled rows of the output and the gradients are compared with dense math first; a backend that is wrong gets no number.
    On a CPU the cases are small.

    Exit status 1 if a backend is wrong or breaks, if one that --backend names gets no number for a case, or if there is no
    number at all.
    """
    from attnmux.cli.device import checked_device
    from attnmux.cli.output import make_console, plugin_output_to_stderr, print_json
    from attnmux.errors import UnsupportedRequestError
    from attnmux.registry import get_registry

    if output is not None and not output.resolve().parent.is_dir():
        raise UnsupportedRequestError(
            f"the folder of --output {str(output)!r} does not exist; create it, or name another"
        )
    registry = get_registry()
    wanted = [name for item in backends or [] for name in item.split(",") if name.strip()]
    # a wrong name is told at once, before torch is imported
    names = list(dict.fromkeys(registry.resolve(name) for name in wanted)) or sorted(registry.records())
    rows: list[dict[str, Any]] = []
    with plugin_output_to_stderr(as_json=as_json), make_console(stderr=True).status("measuring") as status:
        from attnmux.bench import BenchOptions, describe_environment, parse_shape, run_backend, write_rows

        options = BenchOptions(
            device=checked_device(device),
            dtype=_dtype(dtype),
            directions=("forward", "backward") if backward else ("forward",),
            shapes=tuple(parse_shape(text) for text in shapes or []),
            is_quick=quick,
            budget_s=_QUICK_BUDGET_S if quick else _BUDGET_S,
        )
        environment = describe_environment(options.device)
        for name in names:
            status.update(f"measuring {name}")
            for row in run_backend(name, options, environment):
                rows.append(row)
                if output is not None:
                    # after each, so that an interruption loses nothing
                    write_rows(output, rows)
    is_ok = _is_ok(rows, is_strict=bool(wanted))
    if as_json:
        print_json({"ok": is_ok, "rows": rows})
    else:
        _show(rows)
    if not is_ok:
        raise typer.Exit(1)


def _dtype(name: str | None) -> str | None:
    from attnmux.errors import UnsupportedRequestError
    from attnmux.spec import DTYPES

    if name is not None and name not in DTYPES:
        raise UnsupportedRequestError(f"--dtype {name!r} is not a dtype of attention; expected one of {DTYPES}")
    return name


def _is_ok(rows: Sequence[dict[str, Any]], *, is_strict: bool) -> bool:
    gates = {row["gate"] for row in rows}
    return "green" in gates and not gates & ({"red", "failed", "not run"} if is_strict else {"red", "failed"})


def _show(rows: Sequence[dict[str, Any]]) -> None:
    from attnmux.bench.tables import shape_text
    from attnmux.cli.output import make_table, plain_text, show

    columns = ("backend", "case", "shape", "dtype", "blocks", "direction", "median ms", "p20 ms", "p80 ms", "TFLOP/s")
    cells = []
    for row in rows:
        if row["median_ms"] is None:
            continue
        case = (row["case"], shape_text(row), row["dtype"], row["blocks"], row["direction"])
        times = (f"{row[key]:.3f}" for key in ("median_ms", "p20_ms", "p80_ms"))
        cells.append((row["backend"], *case, *times, f"{row['tflops']:.3g}", row["engine"]))
    environment = f"{rows[0]['device']}, torch {rows[0]['torch']}" if rows else ""
    if cells:
        table = make_table((*columns, "engine"), cells, title=f"Attention on {environment}", right=columns[6:])
        show(table)
    for text, is_fault in _reasons(rows).items():
        show(plain_text(text, "bold red" if is_fault else "yellow"))
    if not cells:
        show(
            plain_text(
                f"no number: nothing was measured on {environment}" if rows else "no backend is installed", "red"
            )
        )


def _reasons(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Lines that say why rows have no number, and whether that is a fault."""
    lines = {}
    for row in rows:
        if "refused" in row:
            subject = f"{row['backend']} {row['case']} {row['direction']}" if row["case"] != "none" else row["backend"]
            lines[f"{row['gate']}: {subject}: {row['refused']}"] = row["gate"] in ("red", "failed")
    return lines
