"""Why a backend was or was not selected, as text and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from attnmux.spec import AttentionRequest, Reason

__all__ = ["Candidate", "SelectionReport", "Source", "Status"]

Status = Literal["selected", "eligible", "rejected", "unavailable", "not_installed", "failed", "conflict", "disabled"]
Source = Literal["argument", "scope", "forced", "environment", "default", "automatic"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One backend in a report.

    Attributes:
        backend: Its name.
        distribution: Who registers it; for a conflict all of them, joined by " and ".
        version: Version of that distribution; empty if it is not installed.
        status: What became of it.
        reasons: Why; for a backend that would serve, what it would use.
        hint: What to do to use it; empty where nothing need or can be done.
    """

    backend: str
    distribution: str
    version: str
    status: Status
    reasons: tuple[Reason, ...] = ()
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {
            "backend": self.backend,
            "distribution": self.distribution,
            "version": self.version,
            "status": self.status,
            "reasons": [str(reason) for reason in self.reasons],
            "hint": self.hint,
        }


@dataclass(frozen=True, kw_only=True)
class SelectionReport:
    """Outcome of one selection: the request, where the choice came from, one row per candidate."""

    request: AttentionRequest
    source: Source
    candidates: tuple[Candidate, ...]

    @property
    def selected(self) -> Candidate | None:
        """The row of the chosen backend; None if the selection failed."""
        return next((row for row in self.candidates if row.status == "selected"), None)

    def __getitem__(self, backend: str) -> Candidate:
        for row in self.candidates:
            if row.backend == backend:
                return row
        raise KeyError(backend)

    def to_dict(self) -> dict[str, Any]:
        """Return `{"request": ..., "source": ..., "candidates": [row, ...]}`."""
        return {
            "request": self.request.to_dict(),
            "source": self.source,
            "candidates": [row.to_dict() for row in self.candidates],
        }

    def explain(self) -> str:
        """Return the report for a person: what was asked, what was chosen and why, and every other candidate."""
        asked = ", ".join(
            f"{name}={value}"
            for name, value in self.request.to_dict().items()
            if value not in (None, False) and (self.request.sp_size > 1 or name not in ("sp_size", "sp_strategy"))
        )
        chosen = self.selected
        origin = "automatic choice" if self.source == "automatic" else f"named by the {self.source}"
        lines = [
            f"request: {asked}",
            f"selected: {chosen.backend} ({origin})" if chosen else f"selected: none ({origin})",
        ]
        width = max((len(row.backend) for row in self.candidates), default=0)
        for row in self.candidates:
            owner = f"{row.distribution} {row.version}".strip()
            lines.append(f"  {row.backend:<{width}}  {row.status:<13}  {owner}")
            lines += [f"  {'':<{width}}    - {reason}" for reason in row.reasons]
            if row.hint:
                lines.append(f"  {'':<{width}}    > {row.hint}")
        return "\n".join(lines)
