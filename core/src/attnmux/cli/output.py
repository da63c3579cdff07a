"""What every command prints: JSON, rich tables, errors."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = [
    "STATUS_STYLES",
    "make_console",
    "make_table",
    "plain_text",
    "plugin_output_to_stderr",
    "print_error",
    "print_json",
    "show",
]

STATUS_STYLES = {
    "selected": "bold green",
    "available": "green",
    "eligible": "green",
    "rejected": "yellow",
    "unavailable": "yellow",
    "disabled": "yellow",
    "not_installed": "dim",
    "failed": "bold red",
    "conflict": "bold red",
}


# columns of a file or a pipe, where nothing tells how wide lines may be
_UNKNOWN_WIDTH = 160


def print_json(data: object) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


@contextmanager
def plugin_output_to_stderr(*, as_json: bool) -> Iterator[None]:
    """Send what loaded code prints to stderr inside the block, where stdout is to carry JSON only."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def make_console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr, wide where that is no terminal."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = _UNKNOWN_WIDTH
    return console


def show(*renderables: RenderableType) -> None:
    """Print rich renderables on stdout."""
    console = make_console()
    for renderable in renderables:
        console.print(renderable)


def plain_text(text: str, style: str = "") -> RenderableType:
    """Return text in which brackets are brackets: rich would read `attnmux[flash]` as markup."""
    from rich.text import Text

    return Text(text, style=style)


def make_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", right: Sequence[str] = ()
) -> Table:
    """Return a table of plain text.

    Args:
        columns: Headings. The cells of a column named "status" are coloured by `STATUS_STYLES`.
        rows: Cells, one sequence per row.
        title: Printed above.
        right: Headings of right-aligned columns, which are never wrapped.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for column in columns:
        is_whole = column in right or column in ("name", "backend", "status")
        table.add_column(column, justify="right" if column in right else "left", no_wrap=is_whole, overflow="fold")
    for row in rows:
        cells = zip(columns, row, strict=True)
        table.add_row(
            *(plain_text(cell, STATUS_STYLES.get(cell, "") if name == "status" else "") for name, cell in cells)
        )
    return table


def print_error(error: BaseException, *, as_json: bool) -> None:
    """Print an error as one paragraph on stderr, with `as_json` also as JSON on stdout."""
    from rich.text import Text

    from attnmux.errors import AttnmuxError

    text = str(error)
    if not isinstance(error, AttnmuxError):
        text = f"unexpected {type(error).__name__}: {error} (run the command again with --debug for the traceback)"
    make_console(stderr=True).print(Text.assemble(("error: ", "bold red"), text))
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": str(error)}})
