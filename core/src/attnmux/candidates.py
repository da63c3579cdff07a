"""Judges what could serve a request, and turns the verdicts into a selection or an error. Used by the selector."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from attnmux.errors import (
    AttnmuxError,
    BackendNotInstalledError,
    BackendUnavailableError,
    PluginConflictError,
    PluginLoadError,
    UnknownBackendError,
    UnsupportedRequestError,
)
from attnmux.hooks import get_hook_runner
from attnmux.registry import Record, Registry, conflict_text, disabled_text, install_command
from attnmux.report import Candidate, SelectionReport, Source
from attnmux.spec import AttentionBackendEnum, AttentionRequest, BackendSpec, Reason, canonical_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnmux.backend import AttentionBackend
    from attnmux.settings import EnvironmentSnapshot

__all__ = ["Candidates", "Choice", "Selection"]


@dataclass(frozen=True)
class Selection:
    """The chosen backend.

    Attributes:
        spec: Its spec.
        backend_class: Its class, loaded.
        report: One row per candidate, with the reasons.
    """

    spec: BackendSpec
    backend_class: type[AttentionBackend]
    report: SelectionReport

    @property
    def source(self) -> Source:
        """Where the choice came from."""
        return self.report.source

    @property
    def engine(self) -> str:
        """What the backend would run, in its own words; empty where it does not say."""
        reasons = self.report[self.spec.name].reasons
        return next((reason.text for reason in reasons if reason.code == "engine"), "")

    def explain(self) -> str:
        """Return the report as text."""
        return self.report.explain()


class Choice(NamedTuple):
    """A backend that somebody named, and how messages cite it."""

    name: AttentionBackendEnum | str
    source: Source
    cited: str


class Candidates:
    """One selection: judges each candidate and makes the report from the verdicts."""

    def __init__(
        self,
        registry: Registry,
        environment: EnvironmentSnapshot,
        request: AttentionRequest,
        supported: tuple[AttentionBackendEnum | str, ...] | None,
        cuda_arch: int | None,
    ) -> None:
        registry.check_strict(environment)
        self.registry = registry
        self.request = request
        self.hooks = get_hook_runner(registry, environment)
        self.records = registry.records(environment)
        self.allowed = None if supported is None else tuple(self._resolved(name) for name in supported)
        self.arch = cuda_arch

    def _resolved(self, name: AttentionBackendEnum | str) -> str:
        """Return the name that an alias stands for; a name that nobody registers stays as it is."""
        try:
            return self.registry.resolve(name)
        except UnknownBackendError:
            return canonical_name(name)

    # ---- outcomes

    def honour(self, choice: Choice) -> Selection:
        """Return the explicit choice, or raise all that speaks against it."""
        name = self.registry.resolve(choice.name, asked_by=choice.cited)
        row = self._no_attention() if name == "NO_ATTENTION" else self._judge(name, load=True)
        rows = [row, *(self._judge(other, load=False) for other in self._others({name}))]
        if row.status == "eligible":
            return self._selection(row, rows, choice.source)
        report = SelectionReport(request=self.request, source=choice.source, candidates=tuple(rows))
        raise self._refusal(row, choice, report)

    def prefer(self, default_backend: AttentionBackendEnum | str | None) -> Selection:
        """Return the layer's default if it can serve, else the automatic choice."""
        rows = []
        if default_backend is not None:
            name = self._resolved(default_backend)
            row = self._no_attention() if name == "NO_ATTENTION" else self._judge(name, load=True)
            if row.status == "eligible":
                return self._selection(
                    row, [row, *(self._judge(other, load=False) for other in self._others({name}))], "default"
                )
            note = Reason("default", "it is the layer's default and cannot serve, so that automatic choice followed")
            rows.append(_changed(row, reasons=(note, *row.reasons)))
        rows += [
            _only_exact(self._judge(name, load=True, automatic=True), self._spec(name))
            for name in self._others({row.backend for row in rows})
        ]
        eligible = [row.backend for row in rows if row.status == "eligible"]
        if not eligible:
            report = SelectionReport(request=self.request, source="automatic", candidates=tuple(rows))
            error = UnsupportedRequestError(
                f"no exact attention backend can serve this request.\n{report.explain()}",
                [reason for row in rows for reason in row.reasons],
            )
            error.report = report
            raise error
        best = self._ranked(eligible)[0]
        return self._selection(next(row for row in rows if row.backend == best), rows, "automatic")

    def _ranked(self, eligible: list[str]) -> list[str]:
        priority = {name: spec.priority if (spec := self._spec(name)) else 0 for name in eligible}
        order = sorted(eligible, key=lambda name: (-priority[name], name))
        answers = self.hooks.call("attnmux_rank", request=self.request, candidates=tuple(order))
        if answers:
            first = [name for name in map(canonical_name, answers[0]) if name in priority]
            order = [*dict.fromkeys(first), *(name for name in order if name not in first)]
        return order

    def _selection(self, chosen: Candidate, rows: Sequence[Candidate], source: Source) -> Selection:
        cls = self.registry.backend_class(chosen.backend)
        engine = cls.describe_engine(self.request)
        reasons = (*chosen.reasons, *([Reason("engine", engine)] if engine else []))
        selected = _changed(chosen, status="selected", reasons=reasons)
        others = [row for row in rows if row is not chosen]
        order = {"eligible": 0, "rejected": 1}
        report = SelectionReport(
            request=self.request,
            source=source,
            candidates=(selected, *sorted(others, key=lambda row: order.get(row.status, 2))),
        )
        return Selection(self.registry.spec(chosen.backend), cls, report)

    # ---- judging one candidate

    def _others(self, done: set[str]) -> list[str]:
        known = [name for name in AttentionBackendEnum.__members__ if name not in {"NO_ATTENTION", *self.records}]
        return [name for name in (*self.records, *known) if name not in done]

    def _spec(self, name: str) -> BackendSpec | None:
        try:
            return self.registry.spec(name)
        except AttnmuxError:
            return None

    def _no_attention(self) -> Candidate:
        return Candidate(backend="NO_ATTENTION", distribution="attnmux", version="", status="eligible")

    def _judge(self, name: str, *, load: bool, automatic: bool = False) -> Candidate:
        """Return a candidate's row.

        Args:
            name: Its name, resolved.
            load: Whether to import its module where everything declared fits, to ask what only it can tell.
            automatic: Whether inexact backends are out anyway and need not be imported.
        """
        record = self.records.get(name)
        if record is None:
            return self._not_installed(name)
        row = Candidate(
            backend=name,
            distribution=" and ".join(claim.distribution for claim in record.enabled) or record.claim.distribution,
            version=record.claim.version,
            status="eligible",
        )
        obstacle = self._record_obstacle(record, row)
        if obstacle is not None:
            return obstacle
        spec = self.registry.spec(name)
        unavailable = self.registry.obstacle(spec)
        if unavailable is not None:
            return _changed(row, status="unavailable", reasons=(unavailable,), hint=unavailable.hint)
        reasons = [*self._restrictions(name), *spec.capabilities.missing(self.request, self.arch)]
        if not reasons and load and not (automatic and spec.capabilities.exactness != "exact"):
            try:
                reasons += self.registry.backend_class(name).check_request(self.request)
            except PluginLoadError as error:
                return _failed(row, error)
        return _changed(row, status="rejected" if reasons else "eligible", reasons=tuple(reasons))

    def _record_obstacle(self, record: Record, row: Candidate) -> Candidate | None:
        if record.is_conflict:
            text = f"registered by {' and '.join(str(claim) for claim in record.enabled)}"
            return _changed(row, status="conflict", reasons=(Reason("conflict", text),), hint=conflict_text(record))
        if not record.enabled:
            return _changed(row, status="disabled", reasons=(Reason("disabled", disabled_text(record)),))
        try:
            self.registry.spec(record.name)
        except PluginLoadError as error:
            return _failed(row, error)
        return None

    def _restrictions(self, name: str) -> list[Reason]:
        reasons = []
        if self.allowed is not None and name not in self.allowed:
            reasons.append(
                Reason("allow_list", f"the layer allows {', '.join(self.allowed)} only (supported_attention_backends)")
            )
        vetoes = self.hooks.call("attnmux_veto", request=self.request, backend=name)
        return reasons + [Reason("veto", f"a hook forbids it: {veto}") for veto in vetoes]

    def _not_installed(self, name: str) -> Candidate:
        member = AttentionBackendEnum.__members__.get(name)
        row = Candidate(
            backend=name, distribution=member.distribution if member else "", version="", status="not_installed"
        )
        if member is None:
            return _changed(row, reasons=(Reason("unknown", "no installed distribution registers this name"),))
        return _changed(row, hint=install_command(name))

    def _refusal(self, row: Candidate, choice: Choice, report: SelectionReport) -> AttnmuxError:
        """Return the error for an explicit choice that cannot be honoured."""
        named_by = "" if choice.source == "argument" else f" (named by {choice.cited})"
        error: AttnmuxError
        if row.status in ("conflict", "disabled", "not_installed", "failed"):
            try:
                self.registry.spec(row.backend)
                self.registry.backend_class(row.backend)
            except (BackendNotInstalledError, BackendUnavailableError, PluginConflictError, PluginLoadError) as found:
                error = found
        elif row.status == "unavailable":
            hint = f" Run: {row.hint}" if row.hint else ""
            error = BackendUnavailableError(
                f"attention backend {row.backend!r}{named_by} cannot run here: {row.reasons[0].text}.{hint}"
            )
        else:
            able = [other.backend for other in report.candidates if other.status == "eligible"]
            instead = f" Able to serve it: {', '.join(able)}." if able else ""
            error = UnsupportedRequestError(
                f"attention backend {row.backend!r}{named_by} cannot serve this request: "
                f"{'; '.join(map(str, row.reasons))}.{instead}",
                row.reasons,
            )
        error.report = report
        return error


def _changed(row: Candidate, **fields: object) -> Candidate:
    return dataclasses.replace(row, **fields)  # type: ignore[arg-type]


def _failed(row: Candidate, error: PluginLoadError) -> Candidate:
    reason = Reason("load", str(error.__cause__ or error))
    return _changed(row, status="failed", reasons=(reason,), hint="`attnmux doctor` shows the traceback")


def _only_exact(row: Candidate, spec: BackendSpec | None) -> Candidate:
    """Return the row of an automatic candidate: one that is not exact is rejected, whatever else it can do."""
    if spec is None or row.status not in ("eligible", "rejected") or spec.capabilities.exactness == "exact":
        return row
    kind = spec.capabilities.exactness or "of undeclared exactness"
    reason = Reason("exactness", f"it is {kind}; only exact backends are chosen automatically", "name it to use it")
    return _changed(row, status="rejected", reasons=(reason, *row.reasons))
