"""Checks of the tree that no linter makes: sizes of files, names without a subject, one shape for every plugin."""

import subprocess
import sys
from pathlib import Path

LONGEST = 600
DRAWERS = {"utils.py", "common.py", "helpers.py", "misc.py"}
PLUGIN_FILES = {"__init__.py", "plugin.py", "backend.py", "ops.py", "reference.py", "py.typed"}
ROOT = Path(__file__).resolve().parent.parent


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def problems() -> list[str]:
    found = []
    for path in tracked():
        name = path.relative_to(ROOT)
        if path.suffix == ".py":
            lines = len(path.read_text().splitlines())
            if lines > LONGEST:
                found.append(f"{name}: {lines} lines (at most {LONGEST})")
        if path.name in DRAWERS:
            found.append(f"{name}: give the code a home that says what it is")
    for package in [*ROOT.glob("plugins/*/src/*"), *ROOT.glob("examples/third_party_backend/src/*")]:
        if package.is_dir() and package.suffix != ".egg-info":
            missing = PLUGIN_FILES - {path.name for path in package.iterdir()}
            found += [f"{package.relative_to(ROOT)}: lacks {name}, which every plugin has" for name in sorted(missing)]
    return found


if __name__ == "__main__":
    found = problems()
    sys.stdout.write("".join(f"{line}\n" for line in found))
    sys.exit(1 if found else 0)
