"""Rows of results: what one holds, where it was measured, the files they are kept in."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnmux.errors import UnsupportedRequestError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from attnmux.bench.cases import Case
    from attnmux.bench.harness import Timing

__all__ = ["ROW_KEYS", "Environment", "describe_environment", "make_row", "read_rows", "write_rows"]

ROW_KEYS = (
    "case",
    "backend",
    "engine",
    "direction",
    "B",
    "S",
    "S_k",
    "H",
    "H_kv",
    "D",
    "dtype",
    "causal",
    "keep",
    "blocks",
    "lists",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "repetitions",
    "tflops",
    "gate",
    "errors",
    "peer",
    "device",
    "torch",
    "triton",
    "commit",
    "date",
)
"""Keys of every row. Times are in milliseconds, `tflops` in 1e12 operations per second. `gate` is "green" (timed), "red"
(wrong results), "failed" (it raised) or "not run" (it cannot serve the case); without green the times are null and a key
"refused" holds the reason. Rows may have more keys."""

BACKWARD_WORK = 2.5
"""Operations of the backward pass over those of the forward pass: five matrix products instead of two."""


@dataclass(frozen=True)
class Environment:
    """Where something was measured.

    Attributes:
        device: Name of the card or processor.
        torch: Its version.
        triton: Its version; empty if it is not installed.
        commit: Commit of the measured code, "-dirty" appended if it was changed since; empty if unknown.
        date: Day in UTC, ISO 8601.
    """

    device: str
    torch: str
    triton: str
    commit: str
    date: str


def describe_environment(device: torch.device, *, commit: str | None = None) -> Environment:
    """Return what is known of this machine.

    Args:
        device: Where things are measured.
        commit: Commit to note; None = that of the checkout which holds this package, if it is one.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return Environment(
        device=name,
        torch=str(torch.__version__),
        triton=triton,
        commit=_commit() if commit is None else commit,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def _commit() -> str:
    """Return the commit of the checkout that tracks this file; empty for an installed package."""
    git = shutil.which("git")
    if git is None:
        return ""
    here = Path(__file__).resolve()

    def answer(*arguments: str) -> str:
        done = subprocess.run([git, "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return answer("describe", "--always", "--dirty", "--exclude", "*") if answer("ls-files", here.name) else ""


def make_row(
    case: Case,
    direction: str,
    environment: Environment,
    *,
    backend: str,
    engine: str,
    is_peer: bool = False,
    gate: str,
    errors: dict[str, float] | None = None,
    timing: Timing | None = None,
    pairs: int = 0,
    refused: str = "",
) -> dict[str, Any]:
    """Return one row.

    Args:
        case: What was measured.
        direction: "forward" or "backward".
        environment: Where.
        backend: Name of the backend, or of the peer.
        engine: What ran, in the backend's words.
        is_peer: Whether it is another project's.
        gate: See `ROW_KEYS`.
        errors: Relative L2 errors of the gate.
        timing: The times; None = there is no number.
        pairs: Pairs of query and key that attend, over all samples and heads: what the operations are counted from.
        refused: Why there is no number.
    """
    work = 4.0 * pairs * case.D * (BACKWARD_WORK if direction == "backward" else 1.0)
    row: dict[str, Any] = {
        "case": case.name,
        "backend": backend,
        "engine": engine,
        "direction": direction,
        "B": case.B,
        "S": case.S_q,
        "S_k": case.S_k,
        "H": case.H,
        "H_kv": case.H_kv,
        "D": case.D,
        "dtype": case.dtype,
        "causal": case.causal,
        "keep": case.keep,
        "blocks": case.blocks,
        "lists": case.lists,
        "median_ms": timing and timing.median_ms,
        "p20_ms": timing and timing.p20_ms,
        "p80_ms": timing and timing.p80_ms,
        "repetitions": timing.repetitions if timing else 0,
        "tflops": work / timing.median_ms * 1e-9 if timing else None,
        "gate": gate,
        "errors": errors or {},
        "peer": is_peer,
        "device": environment.device,
        "torch": environment.torch,
        "triton": environment.triton,
        "commit": environment.commit,
        "date": environment.date,
    }
    if refused:
        row["refused"] = refused
    return row


def write_rows(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a file of rows, whole or not at all.

    Raises:
        UnsupportedRequestError: The file cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise UnsupportedRequestError(f"the results {str(target)!r} cannot be written: {error}") from error


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of a file.

    Raises:
        UnsupportedRequestError: The file cannot be read, or does not hold a list of rows.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedRequestError(f"the results {str(path)!r} cannot be read: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "direction" in row for row in rows):
        raise UnsupportedRequestError(f"the results {str(path)!r} are not one list of rows of this harness")
    return rows
