"""The README's commands and code, executed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from attnmux.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
USE, WRITE = README.split("## Write one")


def blocks(kind, text=README):
    return [
        body for found, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if found == kind
    ]


def commands():
    return [line[2:] for body in blocks("console") for line in body.splitlines() if line.startswith("$ ")]


def test_every_block_is_of_a_kind_that_is_executed_here():
    assert {kind for kind, _ in BLOCKS} == {"python", "console", "toml"}


def test_code_runs_in_order(capsys):
    namespace = {}
    for body in blocks("python", USE):
        exec(compile(body, "README.md", "exec"), namespace)
    assert "selected: TORCH_SDPA" in capsys.readouterr().out
    assert namespace["output"].shape == namespace["q"].shape


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("attnmux")])
def test_command_succeeds(command, capsys):
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("make")])
def test_make_target_exists(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_command_is_left_out():
    assert all(command.split()[0] in {"attnmux", "make"} for command in commands())


def test_the_backend_of_the_readme_works_from_its_metadata(tmp_path):
    (package,), (entry_points,) = blocks("python", WRITE), blocks("toml", WRITE)
    assert len(package.splitlines()) <= 18
    (tmp_path / "attnmux_mean.py").write_text(package)
    info = tmp_path / "attnmux_mean-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: attnmux-mean\nVersion: 0.1\n")
    key, value = re.search(r'^(\w+) = "(.*)"$', entry_points, re.MULTILINE).groups()
    (info / "entry_points.txt").write_text(f"[attnmux.backends]\n{key} = {value}\n")
    code = """
import torch
from attnmux import LocalAttention
q = torch.randn(1, 5, 2, 8)
layer = LocalAttention(2, 8, backend="mean_attn")
assert torch.equal(layer(q, q, q), q.mean(1, keepdim=True).expand_as(q))
print(layer.selection.report.candidates[0].distribution)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.stdout.strip() == "attnmux-mean", done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("plugins/*/README.md")), ids=lambda path: path.parent.name)
def test_code_of_a_plugins_readme_runs(path):
    namespace = {}
    found = blocks("python", path.read_text())
    assert found
    for body in found:
        exec(compile(body, str(path), "exec"), namespace)
    assert namespace["out"].shape == namespace["q"].shape


def measured(name, backend, engine, **where):
    """The medians of one group of rows, forward / backward, as the README writes them."""
    rows = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    where = {"backend": backend, "engine": engine, **where}
    found = {row["direction"]: row for row in rows if all(row[key] == value for key, value in where.items())}
    return " / ".join(f"{found[d]['median_ms']:.3f}" for d in ("forward", "backward") if d in found)


SLA = {"S": 32768, "keep": 0.1}
VSA = {"case": "vsa_444", "S": 32768}
SPARSE = {"case": "block_sparse_random", "S": 32768, "blocks": "128x64"}
SAGE = {"case": "sage", "S": 32768}


@pytest.mark.parametrize(
    ("call", "groups"),
    [
        ("BLOCK_SPARSE_ATTN", [
            ("block_sparse.json", "BLOCK_SPARSE_ATTN", "hopper", SPARSE),
            ("block_sparse.json", "SLA", "triton", SPARSE),
        ]),
        ("SLA_ATTN", [("sla.json", *who, SLA) for who in (("SLA_ATTN", "module"), ("SLA", "main branch"), ("SDPA", "cudnn"))]),
        ("VIDEO_SPARSE_ATTN", [
            ("vsa.json", "VIDEO_SPARSE_ATTN", "operator", VSA),
            ("vsa_peers.json", "FASTVIDEO", "triton, tokens in tiles", VSA),
            ("vsa_peers.json", "SDPA", "cudnn", VSA),
        ]),
        ("VMOBA_ATTN", [
            ("vmoba.json", "VMOBA_ATTN", "triton", {"case": "vmoba_spatio_temporal", "lists": "random, top-k 8"}),
            ("vmoba.json", "SDPA", "cudnn", {}),
        ]),
        ("SAGE_ATTN", [
            ("sage.json", "SAGE_ATTN", "fp8 values", SAGE),
            ("sage.json", "SAGEATTENTION", "triton", SAGE),
            ("sage.json", "SDPA", "cudnn", SAGE),
        ]),
        ("SAGE_SLA_ATTN", [("sage.json", "SAGE_SLA_ATTN", "fp8 values", {"S": 32768})]),
    ],
)  # fmt: skip
def test_times_are_those_of_the_results(call, groups):
    (line,) = [line for line in README.splitlines() if line.startswith(f"| `{call}`, ")]
    wanted = [
        number
        for name, backend, engine, where in groups
        for number in measured(name, backend, engine, **where).split(" / ")
    ]
    assert re.findall(r"\d+\.\d{3}", line) == wanted
