"""Fills the tables of a document from result files, and draws a plot of each file.

    python benchmarks/render.py docs/benchmarks.md benchmarks/results [--plots docs/images]

A section begins with `<!-- benchmarks: FILE.json -->`, or `<!-- benchmarks: FILE.json CASE, CASE* -->` for some of its cases, and
ends with `<!-- /benchmarks -->`; what stands between is replaced. Likewise from `<!-- distributed: FILE.json -->` to
`<!-- /distributed -->`, for a file of `benchmarks/distributed.py`.
"""

import argparse
import re
import sys
from pathlib import Path

from distributed_table import fill

from attnmux.bench import read_rows
from attnmux.bench.plots import plot_rows
from attnmux.bench.tables import fill_document
from attnmux.errors import AttnmuxError


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for one picture per result file that the document names")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the document is out of date")
    arguments = parser.parse_args()
    before = arguments.document.read_text(encoding="utf-8")
    try:
        after = fill(fill_document(before, arguments.results), arguments.results)
        if arguments.check:
            return int(after != before)
        arguments.document.write_text(after, encoding="utf-8")
        for name in sorted(set(re.findall(r"<!-- benchmarks: ([\w.-]+)", before)) if arguments.plots else ()):
            arguments.plots.mkdir(parents=True, exist_ok=True)
            rows = read_rows(arguments.results / name)
            plot_rows(rows, arguments.plots / Path(name).with_suffix(".png").name, title=rows[0]["device"])
    except AttnmuxError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
