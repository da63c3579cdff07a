"""The scripts under examples/, run as users run them, on small sizes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(script, *arguments, status=0):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout


def test_diffusers_wan_shows_every_backend_in_a_table_and_a_picture(tmp_path):
    pytest.importorskip("diffusers")
    picture = tmp_path / "wan.png"
    small = ("--frames", 8, "--height", 64, "--width", 96, "--layers", 1, "--heads", 1, "--output", picture)
    rows = {line.split()[0]: line for line in run("diffusers_wan.py", *small).splitlines()}
    assert "0.0e+00" in rows["TORCH_SDPA"]
    assert "1 of 2 attention modules replaced" in rows["VIDEO_SPARSE_ATTN"]
    assert "need index" in rows["BLOCK_SPARSE_ATTN"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    # a backend that was named and cannot run fails the command
    run("diffusers_wan.py", *small, "--backend", "BLOCK_SPARSE_ATTN", status=1)


def test_page_shows_what_the_record_of_the_example_says():
    record = json.loads((ROOT / "benchmarks" / "results" / "diffusers_wan.json").read_text())
    page = (ROOT / "docs" / "integrations.md").read_text()
    own, *rows = (row for row in record["rows"] if "error" not in row)
    shown = re.findall(r"^\| `(\w+_ATTN|TORCH_SDPA)` \|[^|]*\| (\d+) \| (\S+) \|$", page, re.MULTILINE)
    assert shown == [(row["attention"], f"{row['ms_per_step']:.0f}", f"{row['distance']:.1e}") for row in rows]
    assert f"the model's own: {own['ms_per_step']:.0f}" in page
    assert f"{record['tokens']:,} tokens, {record['layers']} layers of {record['heads']} heads" in page


@pytest.mark.parametrize(
    ("ranks", "strategy", "overlap", "collectives"),
    [(1, "ulysses", 1, 0), (2, "ulysses", 2, 8), (2, "ring", 1, 3)],
    ids=str,
)
def test_sequence_parallel_agrees_with_one_process(ranks, strategy, overlap, collectives):
    # 5 heads and 51 tokens are 3 and 2 heads, 26 and 25 tokens
    small = ("--tokens", 51, "--text", 3, "--head-size", 16, "--strategy", strategy, "--overlap", overlap)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / "examples" / "sequence_parallel.py", *map(str, small)],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{ranks} ranks, gloo: 51 tokens" in done.stdout
    assert f"in {collectives} collectives, forward and backward" in done.stdout
    assert done.stdout.count("from float64 in one process") == 4
