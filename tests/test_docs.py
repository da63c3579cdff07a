"""The documents: code blocks and commands run, error messages exist, tables are made from the code, the site builds."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from attnmux import errors
from attnmux.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS = {"integrations.md": "diffusers", "schedules.md": "diffusers"}


def pages_with(kind):
    return [path for path in PAGES if any(found == kind for found, _ in BLOCK.findall(path.read_text()))]


def blocks(path, kind):
    return [body for found, body in BLOCK.findall(path.read_text()) if found == kind]


def name(path):
    return str(path.relative_to(ROOT / "docs"))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", pages_with("python"), ids=name)
def test_code_of_a_page_runs_in_order(path):
    if path.name in NEEDS:
        pytest.importorskip(NEEDS[path.name])
    namespace = {}
    for body in blocks(path, "python"):
        exec(compile(body, str(path), "exec"), namespace)


def sessions():
    """Every command of the pages, with the lines that a page shows below it."""
    return [
        pytest.param(*session.partition("\n")[::2], id=f"{name(path)}: {session.partition(chr(10))[0]}")
        for path in pages_with("console")
        for body in blocks(path, "console")
        for session in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]
    ]


def plain(output):
    """Return the lines of a command without what depends on versions and on the width of the terminal."""
    lines = (" ".join(line.replace("─", "").split()) for line in output.splitlines())
    return [re.sub(r"\d+(\.\d+)+(\+\w+)?", "N.N", line) for line in lines if line]


@pytest.mark.parametrize(("command", "shown"), sessions())
def test_command_of_a_page_prints_what_the_page_shows(command, shown, capsys, monkeypatch):
    for variable in [key for key in os.environ if key.startswith("ATTNMUX_")]:
        monkeypatch.delenv(variable)
    program, *arguments = shlex.split(command)
    assert program == "attnmux"
    # the one request of the documents that is refused, as its page says
    assert main(arguments) == (1 if {"VIDEO_SPARSE_ATTN", "--causal"} <= set(arguments) else 0)
    printed = capsys.readouterr()
    # … stands for any lines, or for the rest of one
    pattern = "".join("(.*\n)*" if line == "…" else re.escape(line).replace("…", ".*") + "\n" for line in plain(shown))
    assert pattern
    lines = "".join(f"{line}\n" for line in plain(printed.out + printed.err))
    assert re.fullmatch(pattern, lines), f"{command} prints\n{lines}"


def test_every_block_is_executed_or_plain_text():
    assert {kind for path in PAGES for kind, _ in BLOCK.findall(path.read_text())} == {"python", "console", "text"}


def test_every_error_has_a_section_in_troubleshooting():
    sections = set(re.findall(r"^## (\w+Error)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE))
    assert sections == set(errors.__all__) - {"AttnmuxError"}


SOURCES = [*(ROOT / "core" / "src").rglob("*.py"), *ROOT.glob("plugins/*/src/**/*.py")]


def message(node):
    """The text of a string in the sources, with … for what is filled in; None for what is no string."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def raised():
    """Every message that is written where one of our errors is raised, as (place, message)."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = message(node.exc.args[0])
                # a message of which a line says nothing in words is put together elsewhere
                if (
                    getattr(node.exc.func, "id", None) in errors.__all__
                    and text
                    and len(re.findall(r"[a-z]+", text)) > 2
                ):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def rows_of_troubleshooting():
    cells = re.findall(r"^\| (`.*?`) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    rows = [row for cell in cells for row in cell[1:-1].split("` or `")]
    return {row: re.compile(".*".join(re.escape(part.strip()) for part in row.split("…")), re.DOTALL) for row in rows}


def test_messages_in_troubleshooting_are_those_of_the_code():
    found = (message(node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text())))
    messages = [text for text in found if text]
    rows = rows_of_troubleshooting()
    assert len(rows) > 100
    assert not [row for row, pattern in rows.items() if not any(map(pattern.search, messages))]


def test_every_message_of_the_code_is_in_troubleshooting():
    patterns = rows_of_troubleshooting().values()
    messages = list(raised())
    assert len(messages) > 200
    assert not [(place, text) for place, text in messages if not any(pattern.search(text) for pattern in patterns)]


def test_backend_table_is_made_from_the_capabilities():
    script = [sys.executable, ROOT / "scripts" / "backend_table.py", ROOT / "docs" / "choose.md", "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_an_efficiency_above_one_is_explained_and_a_computed_one_says_from_what(tmp_path):
    fill = runpy.run_path(str(ROOT / "benchmarks" / "distributed_table.py"))["fill"]
    share = {"backend": "A", "ranks": 2, "strategy": "ulysses", "overlap": 1, "t1_ms": 30.0, "drifted": False}
    rows = [
        {**share, "tp_ms": 14.0, "efficiency": 30 / 28},
        {**share, "overlap": 2, "tp_ms": 16.0, "efficiency": 30 / 32, "drifted": True},
    ]
    of = {
        "backend": "A",
        "gpus": 2,
        "strategy": "ulysses",
        "overlap": 2,
        "efficiency": 0.9,
        "made_from": {"GB_per_s, given": 370.0},
    }
    (tmp_path / "found.json").write_text(json.dumps({"shares_without_transfer": rows, "computed": [of]}))
    found = fill("<!-- distributed: found.json -->old<!-- /distributed -->", tmp_path)
    assert "| A | 2 | ulysses | 1 | 30.0 | 14.0 | 107.1 (1) |  |" in found
    assert "| A | 2 | ulysses | 2 | 30.0 | 16.0 | 93.8 (2) | 90.0 |" in found
    assert "(1) above 1: attention to a share takes less time per head" in found
    assert "at 370 GB/s, which was given and not measured" in found
    assert "old" not in found
    measured = {"backend": "A", "strategy": "ring", "overlap": 1, "t1_ms": 30.0, "tp_ms": 20.0, "efficiency": 0.75}
    more = {"gpus": 8, "strategy": "ulysses", "efficiency": 0.5, "made_from": {"exchange_GB_per_s": 180.0}}
    trained = {**measured, "direction": "forward + backward", "drifted": False}
    record = {
        "ranks": 2,
        "rows": [{**measured, "direction": "forward", "drifted": True}, trained],
        "computed": [more],
    }
    (tmp_path / "found.json").write_text(json.dumps(record))
    found = fill("<!-- distributed: found.json -->old<!-- /distributed -->", tmp_path)
    assert "| A | ring | 1 | 30.0 | 20.0 | 75.0 (2) |" in found
    assert "| A | ring, forward + backward | 1 | 30.0 | 20.0 | 75.0 |" in found
    assert "| 8 | ulysses | 50 | exchange GB per s 180 |" in found.split("GPUs, computed")[1]


def test_command_page_names_every_command():
    from attnmux.cli.app import COMMANDS

    page = (ROOT / "docs" / "cli.md").read_text()
    assert all(f"`attnmux {command}" in page for command in COMMANDS)


@pytest.mark.parametrize("command", ["list", "explain", "doctor"])
def test_command_page_names_what_the_json_holds(command, capsys):
    page = (ROOT / "docs" / "cli.md").read_text()
    shown = re.search(rf"^- `{command}`: `\{{(.*?)\}}`$", page, re.MULTILINE | re.DOTALL)[1]
    tables = {
        key: set(re.findall(r'"(\w+)"', row)) for key, row in re.findall(r'"(\w+)": \[\{(.*?)\}\]', shown, re.DOTALL)
    }
    keys = set(re.findall(r'"(\w+)"', re.sub(r"\[\{.*?\}\]", "", shown, flags=re.DOTALL)))
    assert main([command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert keys == set(document)
    assert all(set(row) == tables[key] for key in tables for row in document[key])


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'attnmux[docs]'")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "scripts" / "docs", "--site-dir", tmp_path / "site"],
        capture_output=True, text=True, check=False, env={**os.environ, "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        place = name(page).removesuffix(".md").removesuffix("index")
        assert (tmp_path / "site" / place / "index.html").is_file()
