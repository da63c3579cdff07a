"""The documents: code blocks and commands run, error messages exist, tables are made from the code, the site builds."""

import ast
import os
import re
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


def commands():
    return [
        pytest.param(line[2:], id=f"{name(path)}: {line[2:]}")
        for path in pages_with("console")
        for body in blocks(path, "console")
        for line in body.splitlines()
        if line.startswith("$ ")
    ]


@pytest.mark.parametrize("command", commands())
def test_command_of_a_page_runs(command, capsys):
    program, *arguments = shlex.split(command)
    assert program == "attnmux"
    # the one request of the documents that is refused, as its page says
    assert main(arguments) == (1 if {"VIDEO_SPARSE_ATTN", "--causal"} <= set(arguments) else 0)
    assert capsys.readouterr().out


def test_every_block_is_executed_or_plain_text():
    assert {kind for path in PAGES for kind, _ in BLOCK.findall(path.read_text())} == {"python", "console", "text"}


def test_every_error_has_a_section_in_troubleshooting():
    sections = set(re.findall(r"^## (\w+Error)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE))
    assert sections == set(errors.__all__) - {"AttnmuxError"}


def literals():
    """Every message in the sources, with … for what is filled in."""
    found = []
    for path in [*(ROOT / "core" / "src").rglob("*.py"), *ROOT.glob("plugins/*/src/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_in_troubleshooting_are_those_of_the_code():
    rows = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    messages = literals()
    missing = [row for row in rows if not all(part.strip() in messages for part in row.split("…"))]
    assert not missing


def test_backend_table_is_made_from_the_capabilities():
    script = [sys.executable, ROOT / "scripts" / "backend_table.py", ROOT / "docs" / "choose.md", "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_command_page_names_every_command():
    from attnmux.cli.app import COMMANDS

    page = (ROOT / "docs" / "cli.md").read_text()
    assert all(f"`attnmux {command}" in page for command in COMMANDS)


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
