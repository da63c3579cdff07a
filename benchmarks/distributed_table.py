"""Tables, and a plot, of what `distributed.py` wrote: efficiency over several GPUs, or one rank's share, and what is computed."""

import json
import re

HEADER = (
    "| attention | GPUs | strategy | groups of heads | one GPU alone, ms | its share, ms | transfers left out | computed |\n"
    "|---|---|---|---|---|---|---|---|\n"
)
MEASURED = "| attention | strategy | groups of heads | one GPU, ms | {ranks}, ms | efficiency, % |\n|---|---|---|---|---|---|\n"
COMPUTED = "| GPUs, computed | strategy | efficiency, % | made from |\n|---|---|---|---|\n"
FASTER = "above 1: attention to a share takes less time per head than to all heads, which is no gain of the exchange"


DRIFTED = "(2) The time of one GPU drifted by more than 2 %.\n"


def measured_table(found):
    """Markdown: what ran on several GPUs, and what follows from it for more, marked as computed."""
    lines, above, drifted = [], False, False
    for row in found["rows"]:
        direction = "" if row["direction"] == "forward" else f", {row['direction']}"
        cells = [row["backend"], row["strategy"] + direction, row["overlap"]]
        if "efficiency" not in row:
            lines.append("| " + " | ".join(map(str, [*cells, "", "", row.get("refused", "")])) + " |\n")
            continue
        marks = " (1)" * (row["efficiency"] > 1) + " (2)" * row["drifted"]
        above, drifted = above or row["efficiency"] > 1, drifted or row["drifted"]
        cells += [f"{row['t1_ms']:.1f}", f"{row['tp_ms']:.1f}", f"{100 * row['efficiency']:.1f}{marks}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |\n")
    notes = [f"(1) {FASTER}.\n"] * above + [DRIFTED] * drifted
    text = MEASURED.format(ranks=f"{found['ranks']} GPUs") + "".join(lines) + "".join(f"\n{note}" for note in notes)
    for row in found["computed"]:
        made_from = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in row["made_from"].items())
        text += f"\n{COMPUTED}" * (row is found["computed"][0])
        text += f"| {row['gpus']} | {row['strategy']} | {100 * row['efficiency']:.0f} | {made_from} |\n"
    return text


def table(found):
    """Markdown: shares of one GPU's work, and efficiency computed for transfers at a bandwidth that was given, in percent."""
    computed = {_key(row, "gpus"): row for row in found["computed"] if "backend" in row}
    lines, above, drifted, given = [], False, False, set()
    for row in found["shares_without_transfer"]:
        if "efficiency" not in row:
            continue
        of_transfers = computed.get(_key(row, "ranks"))
        shown = [
            f"{100 * row['efficiency']:.1f}",
            "" if of_transfers is None else f"{100 * of_transfers['efficiency']:.1f}",
        ]
        values = [row["efficiency"], *([] if of_transfers is None else [of_transfers["efficiency"]])]
        for place, value in enumerate(values):
            if value > 1:
                shown[place], above = f"{shown[place]} (1)", True
        if row["drifted"]:
            shown[0], drifted = f"{shown[0]} (2)", True
        if of_transfers is not None:
            given.add(of_transfers["made_from"]["GB_per_s, given"])
        cells = [
            row["backend"],
            row["ranks"],
            row["strategy"],
            row["overlap"],
            f"{row['t1_ms']:.1f}",
            f"{row['tp_ms']:.1f}",
            *shown,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |\n")
    notes = [
        f"Efficiency in percent; computed: transfers that nothing hides at {gbs:g} GB/s, which was given and not measured.\n"
        for gbs in sorted(given)
    ]
    notes += [f"(1) {FASTER}.\n"] * above
    notes += [DRIFTED] * drifted
    return HEADER + "".join(lines) + ("\n" + "\n".join(notes) if notes else "")


def _key(row, gpus):
    return row["backend"], row[gpus], row["strategy"], row["overlap"]


def fill(text, results):
    """Replace what stands between `<!-- distributed: FILE.json -->` and `<!-- /distributed -->`."""

    def replacement(found):
        record = json.loads((results / found[2]).read_text(encoding="utf-8"))
        made = measured_table if record.get("ranks", 1) > 1 else table
        return f"{found[1]}\n\n{made(record)}\n{found[3]}"

    return re.sub(r"(<!-- distributed: ([\w.-]+) -->).*?(<!-- /distributed -->)", replacement, text, flags=re.DOTALL)


def plot(found, path):
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if row["gate"] == "green"]
    figure = Figure(figsize=(7, 1.4 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['backend']} {row['strategy']} x{row['overlap']} {row['direction']}" for row in rows]
    axes.barh(
        names,
        [100 * row["efficiency"] for row in rows],
        color=["#b0b7bd" if row["peer"] else "#2a6f97" for row in rows],
    )
    axes.invert_yaxis()
    axes.set_xlabel("efficiency, %")
    figure.suptitle(f"{found['ranks']} ranks, {found['device']} (grey: other projects)", fontsize="medium")
    figure.savefig(path, dpi=150)
