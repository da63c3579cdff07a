"""Runs the kernel cases in Triton's interpreter, which must be chosen before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_triton_kernels_pass_in_the_interpreter():
    pytest.importorskip("triton")
    pytest.importorskip("numpy")
    here = Path(__file__).parent
    paths = [str(here), *(p for p in sys.path if p)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    # The interpreter and NumPy warn about one another.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "filterwarnings="]
    command = [sys.executable, "-m", "pytest", *options, str(here / "interpreter_cases.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
