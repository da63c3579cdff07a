"""Markdown tables of rows, and a document's sections that are made from result files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from attnmux.bench.record import read_rows
from attnmux.errors import UnsupportedRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["fill_document", "group_rows", "label_of", "markdown_table", "shape_text"]

_MARKER = re.compile(
    r"(?P<open><!-- benchmarks: (?P<file>[\w.-]+)(?: (?P<cases>[\w*, -]+))? -->\n).*?(?P<close><!-- /benchmarks -->)",
    re.DOTALL,
)
_SHAPE_KEYS = ("case", "B", "S", "S_k", "H", "H_kv", "D", "dtype", "causal", "keep", "blocks", "lists")


def group_rows(rows: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Return rows by case, backend and engine, each by direction: in the order in which they come, one case together."""
    cases: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, dict[str, Any]]]] = {}
    for row in rows:
        case = tuple(row.get(name) for name in _SHAPE_KEYS)
        groups = cases.setdefault(case, {})
        groups.setdefault((*case, row["backend"], row["engine"]), {})[row["direction"]] = row
    return {key: group for groups in cases.values() for key, group in groups.items()}


def shape_text(row: dict[str, Any]) -> str:
    """Return the shape of a row in a few words: "S=32768 H=12 D=128", with batch, key length and GQA where they differ."""
    parts = [f"B={row['B']}"] if row["B"] != 1 else []
    parts.append(f"S={row['S']}" if row.get("S_k", row["S"]) == row["S"] else f"S={row['S']}/{row['S_k']}")
    heads = row.get("H_kv", row["H"])
    parts.append(f"H={row['H']}" if heads == row["H"] else f"H={row['H']}/{heads}")
    return " ".join([*parts, f"D={row['D']}"])


def label_of(row: dict[str, Any]) -> str:
    """Return who was measured: the backend with its engine in brackets."""
    return f"{row['backend']} ({row['engine']})" if row["engine"] else str(row["backend"])


def _time(row: dict[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    if row["median_ms"] is None:
        return str(row["gate"]), ""
    return f"{row['median_ms']:.3f} ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})", f"{row['tflops']:.0f}"


def _case_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["S"], row.get("lists"), row.get("keep")


def _case_names(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], str]:
    """Return what to call each case: by its lists and its kept fraction too where cases of one name and length differ in them."""
    keys = dict.fromkeys(map(_case_key, rows))
    names = {}
    for key in keys:
        name, length, lists, keep = key
        like = [other for other in keys if other[:2] == (name, length)]
        parts = [str(name)]
        if lists and len({other[2] for other in like}) > 1:
            parts.append(str(lists))
        if keep is not None and len({other[3] for other in like if other[2] == lists}) > 1:
            parts.append(f"keep {keep:g}")
        names[key] = ", ".join(parts)
    return names


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table with one line per case and engine, forward and backward side by side, and a line on where.

    Times are medians in milliseconds, 20th to 80th percentile in brackets. What has no number is listed below the table with
    its reason.
    """
    if not rows:
        return "No rows.\n"
    head = ("case", "blocks", "shape", "backend", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    reasons: dict[str, None] = {}
    names = _case_names(rows)
    for group in group_rows(rows).values():
        row = next(iter(group.values()))
        cells = (names[_case_key(row)], row["blocks"].replace("x", " x "), shape_text(row), label_of(row))
        times = (*_time(group.get("forward")), *_time(group.get("backward")))
        lines.append(f"| {' | '.join(map(str, (*cells, *times)))} |")
        for found in group.values():
            if reason := found.get("refused"):
                one_line = " ".join(str(reason).split())
                reasons[f"- {label_of(found)}, {found['case']}, {found['direction']}: {one_line}"] = None
    places = sorted(
        {
            f"{row['device']}, torch {row['torch']}, triton {row['triton'] or 'not installed'}, commit "
            f"{row['commit'] or 'unknown'}, {row['date']}, {row['dtype']}"
            for row in rows
        }
    )
    text = "\n".join(lines) + f"\n\nMeasured on {'; and on '.join(places)}.\n"
    return text + ("\nWithout a number:\n\n" + "\n".join(reasons) + "\n" if reasons else "")


def fill_document(text: str, results: Path) -> str:
    """Return a document with the tables between its markers made anew.

    A section begins with `<!-- benchmarks: FILE.json -->`, or `<!-- benchmarks: FILE.json CASE, CASE* -->` for some cases (a
    star stands for any ending), and ends with `<!-- /benchmarks -->`.

    Args:
        text: The document, Markdown.
        results: Folder of the result files.

    Raises:
        UnsupportedRequestError: There is no section, or a file cannot be read.
    """

    def replacement(found: re.Match[str]) -> str:
        rows = read_rows(results / found["file"])
        if found["cases"]:
            rows = [row for row in rows if any(_matches(row["case"], name) for name in found["cases"].split(","))]
        return f"{found['open']}\n{markdown_table(rows)}\n{found['close']}"

    filled, count = _MARKER.subn(replacement, text)
    if not count:
        raise UnsupportedRequestError(
            "the document has no section for a table; write '<!-- benchmarks: FILE.json -->' and '<!-- /benchmarks -->' "
            "on lines of their own"
        )
    return filled


def _matches(case: str, name: str) -> bool:
    name = name.strip()
    return case.startswith(name[:-1]) if name.endswith("*") else case == name
