"""Write the table of backends into a document, from the capabilities that the core and the plugins declare.

python scripts/backend_table.py docs/choose.md [--check]
"""

import re
import sys
from pathlib import Path

from attnmux.contract import import_target
from attnmux.spec import BackendSpec

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "backend",
    "package",
    "exactness",
    "devices",
    "head sizes",
    "masks",
    "causal",
    "GQA",
    "cross",
    "training",
    "inputs",
)


def specs() -> list[tuple[str, BackendSpec]]:
    found = []
    for path in [ROOT / "core" / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]:
        text = path.read_text()
        package = re.search(r'^name = "(.*)"$', text, re.MULTILINE)[1]
        section = text.partition('[project.entry-points."attnmux.backends"]\n')[2].partition("\n[")[0]
        found += [(package, import_target(target)) for target in re.findall(r'^\w+ = "(.*)"$', section, re.MULTILINE)]
    return found


def sizes(spec: BackendSpec) -> str:
    declared = sorted(spec.capabilities.head_sizes)
    if len(declared) < 4:
        return ", ".join(map(str, declared))
    step = declared[1] - declared[0]
    return f"{declared[0]} to {declared[-1]}" + (f" by {step}" if step > 1 else "")


def devices(spec: BackendSpec) -> str:
    archs = sorted(spec.capabilities.cuda_archs - {"any"})
    names = {"cpu": "CPU", "cuda": f"CUDA (sm_{', '.join(map(str, archs))})" if archs else "CUDA"}
    return ", ".join(names[name] for name in sorted(spec.capabilities.devices))


def table() -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for package, spec in specs():
        can = spec.capabilities
        needs = ["metadata"] if can.needs_metadata else []
        needs += ["parameters of its own"] if can.trainable_parameters else []
        rows.append(
            (
                f"`{spec.name}`", package, can.exactness or "", devices(spec), sizes(spec), ", ".join(sorted(can.masks)),
                *("yes" if has else "" for has in (can.causal, can.gqa, can.cross_attention, can.backward)),
                ", ".join(needs + [f"`{name}`" for name in sorted(can.extra_inputs)]),
            )
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    path = Path(sys.argv[1])
    text = path.read_text()
    made = re.sub(
        r"(<!-- backends -->\n).*?(<!-- /backends -->)", lambda m: f"{m[1]}\n{table()}\n\n{m[2]}", text, flags=re.DOTALL
    )
    if "--check" in sys.argv:
        if made != text:
            sys.stdout.write(f"{path} differs from the capabilities: python scripts/backend_table.py {path}\n")
        return int(made != text)
    path.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
