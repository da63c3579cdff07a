"""A bar plot of one table of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnmux.bench.tables import group_rows, label_of, shape_text
from attnmux.errors import MissingPackageError, UnsupportedRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["plot_rows"]

_LINE_INCHES = 0.22
_COLOURS = {False: "#2a6f97", True: "#b0b7bd"}


@dataclass(frozen=True)
class _Line:
    """One line of the plot: a heading, or the rows of one competitor by direction."""

    text: str
    found: dict[str, dict[str, Any]]


def _lines(rows: Sequence[dict[str, Any]]) -> list[_Line]:
    """A heading for each case, and below it those that were measured on it."""
    lines: list[_Line] = []
    heading = ""
    for group in group_rows(rows).values():
        found = {direction: row for direction, row in group.items() if row["median_ms"] is not None}
        if not found:
            continue
        row = next(iter(found.values()))
        parts = (row["case"], row["blocks"].replace("x", " x "), shape_text(row))
        case = " ".join(part for part in parts if part)
        if case != heading:
            heading = case
            lines.append(_Line(case, {}))
        lines.append(_Line(label_of(row), found))
    return lines


def plot_rows(rows: Sequence[dict[str, Any]], path: Path, *, title: str = "") -> None:
    """Draw the speeds of rows as horizontal bars, one panel per direction, with the spread of the times as a line.

    Args:
        rows: Rows of one table; those without a number are left out.
        path: Picture to write; its ending says which kind.
        title: Printed above.

    Raises:
        MissingPackageError: matplotlib is not installed.
        UnsupportedRequestError: No row has a number, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("the plots need matplotlib. Run: pip install 'attnmux[bench]'") from error

    lines = _lines(rows)
    directions = [name for name in ("forward", "backward") if any(name in line.found for line in lines)]
    if not directions:
        raise UnsupportedRequestError(f"there is nothing to plot in {str(path)!r}: no row has a number")
    figure = Figure(figsize=(3.5 + 4.0 * len(directions), 1.2 + _LINE_INCHES * len(lines)), layout="constrained")
    panels = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
    for axes, direction in zip(panels, directions, strict=True):
        drawn = [(place, line.found[direction]) for place, line in enumerate(lines) if direction in line.found]
        # the slow end of the times is the low end of the speeds
        spread = [
            [row["tflops"] * (1 - row["median_ms"] / row["p80_ms"]) for _, row in drawn],
            [row["tflops"] * (row["median_ms"] / row["p20_ms"] - 1) for _, row in drawn],
        ]
        colours = [_COLOURS[bool(row["peer"])] for _, row in drawn]
        speeds = [row["tflops"] for _, row in drawn]
        axes.barh([place for place, _ in drawn], speeds, xerr=spread, color=colours, ecolor="#404040")
        axes.set_xlabel("TFLOP/s")
        axes.set_title(direction)
    panels[0].set_yticks(range(len(lines)), [line.text for line in lines])
    for label, line in zip(panels[0].get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if line.found else "bold")
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    figure.supxlabel("more is better; grey: other projects; line: 20th to 80th percentile", fontsize="small")
    if title:
        figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UnsupportedRequestError(f"the picture {str(path)!r} cannot be written: {error}") from error
