"""A bar plot of one table of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnmux.bench.tables import label_of, shape_text
from attnmux.errors import MissingPackageError, UnsupportedRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["plot_rows"]

_BAR_INCHES = 0.28
_COLOURS = {False: "#2a6f97", True: "#b0b7bd"}


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

    panels = {
        direction: [row for row in rows if row["direction"] == direction and row["median_ms"] is not None]
        for direction in ("forward", "backward")
    }
    panels = {direction: found for direction, found in panels.items() if found}
    if not panels:
        raise UnsupportedRequestError(f"there is nothing to plot in {str(path)!r}: no row has a number")
    height = 1.2 + _BAR_INCHES * max(map(len, panels.values()))
    figure = Figure(figsize=(9.0 * len(panels), height), layout="constrained")
    for axes, (direction, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        places = range(len(found))
        speeds = [row["tflops"] for row in found]
        # the slow end of the times is the low end of the speeds
        spread = [
            [row["tflops"] * (1 - row["median_ms"] / row["p80_ms"]) for row in found],
            [row["tflops"] * (row["median_ms"] / row["p20_ms"] - 1) for row in found],
        ]
        colours = [_COLOURS[bool(row["peer"])] for row in found]
        axes.barh(places, speeds, xerr=spread, color=colours, ecolor="#404040")
        axes.set_yticks(places, [f"{row['case']} {row['blocks']} {shape_text(row)}: {label_of(row)}" for row in found])
        axes.invert_yaxis()
        axes.set_xlabel("TFLOP/s, more is better; grey: other projects")
        axes.set_title(direction)
    if title:
        figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UnsupportedRequestError(f"the picture {str(path)!r} cannot be written: {error}") from error
