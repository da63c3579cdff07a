"""Which backends are installed, who registers them, and how one is loaded without harming another.

Discovery reads the metadata of installed distributions and imports nothing. A spec module is imported when its backend
is listed or considered, the backend's own module when it is used. Whatever a plugin raises on the way becomes a
`LoadFailure` and reaches only those who ask for that backend.
"""

from __future__ import annotations

import sys
import threading
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from attnmux.contract import checked_class, checked_spec, import_target, unmet_requirement
from attnmux.errors import (
    BackendNotInstalledError,
    BackendUnavailableError,
    PluginApiError,
    PluginConflictError,
    PluginLoadError,
    UnknownBackendError,
)
from attnmux.settings import ENV_DISABLE_PLUGINS, ENV_PLUGINS, ENV_STRICT, EnvironmentSnapshot, read_environment
from attnmux.spec import DTYPES, AttentionBackendEnum, BackendSpec, Capabilities, Reason, canonical_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from attnmux.backend import AttentionBackend

__all__ = [
    "BACKENDS_GROUP",
    "CORE_DISTRIBUTION",
    "PLUGINS_GROUP",
    "Claim",
    "EntryPointLike",
    "LoadFailure",
    "Record",
    "Registry",
    "get_registry",
]

BACKENDS_GROUP = "attnmux.backends"
PLUGINS_GROUP = "attnmux.plugins"
CORE_DISTRIBUTION = "attnmux"

_NO_ATTENTION = BackendSpec(
    "NO_ATTENTION",
    target="attnmux.backends.none:NoAttentionBackend",
    # whatever is passed must reach the impl, which says why it cannot run
    capabilities=Capabilities(dtypes=frozenset(DTYPES), devices=frozenset({"cpu", "cuda"}), backward=True),
    summary="builds a layer without any kernel; its forward raises",
)


class DistributionLike(Protocol):
    """The part of `importlib.metadata.Distribution` that is read."""

    name: str
    version: str


class EntryPointLike(Protocol):
    """The part of `importlib.metadata.EntryPoint` that is read."""

    name: str
    value: str
    group: str
    dist: DistributionLike | None

    def load(self) -> Any:
        """Import and return the object."""


@dataclass(frozen=True)
class Claim:
    """One distribution's entry point for a name."""

    distribution: str
    version: str
    entry_point: EntryPointLike

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class Record:
    """One backend name and the distributions that register it.

    Attributes:
        name: Backend name.
        enabled: Claims that the variables allow; more than one is a conflict, none means disabled.
        disabled: The others, each with the variable that rules it out.
    """

    name: str
    enabled: tuple[Claim, ...]
    disabled: tuple[tuple[Claim, str], ...] = ()

    @property
    def claim(self) -> Claim:
        """The claim that counts: the only enabled one, else the first of any."""
        return self.enabled[0] if self.enabled else self.disabled[0][0]

    @property
    def is_conflict(self) -> bool:
        """Whether several enabled distributions claim the name."""
        return len(self.enabled) > 1


@dataclass(frozen=True)
class LoadFailure:
    """What went wrong in a plugin.

    Attributes:
        distribution: Who shipped it.
        version: Its version.
        name: Entry point: the backend's or the plugin's name.
        phase: "import", "contract", "probe", "backend" or "hook <name>".
        error: The exception.
        traceback: Its traceback as text.
    """

    distribution: str
    version: str
    name: str
    phase: str
    error: BaseException
    traceback: str

    @property
    def cause(self) -> str:
        """The exception's type and text on one line."""
        return f"{type(self.error).__name__}: {self.error}".replace("\n", " ")

    def to_dict(self) -> dict[str, str]:
        """Return `{"distribution", "version", "name", "phase", "error", "traceback"}`."""
        return {
            "distribution": self.distribution,
            "version": self.version,
            "name": self.name,
            "phase": self.phase,
            "error": self.cause,
            "traceback": self.traceback,
        }


def _installed_entry_points(group: str) -> Iterable[EntryPointLike]:
    from importlib_metadata import entry_points

    return entry_points(group=group)


class Registry:
    """Backends by name.

    Args:
        entry_points: Returns the entry points of a group; by default those of the installed distributions.
    """

    def __init__(self, entry_points: Callable[[str], Iterable[EntryPointLike]] = _installed_entry_points) -> None:
        self._entry_points = entry_points
        self._lock = threading.RLock()
        self._extra: list[EntryPointLike] = []
        self.generation = 0
        """Grows whenever what is registered may have changed; part of every cache key."""
        self.failures: list[LoadFailure] = []
        self._reset()

    def _reset(self) -> None:
        self.generation += 1
        self.failures.clear()
        self._claims: dict[str, tuple[tuple[str, Claim], ...]] = {}
        self._specs: dict[tuple[str, str], BackendSpec | LoadFailure] = {}
        self._classes: dict[tuple[str, str], type[AttentionBackend] | LoadFailure] = {}
        self._obstacles: dict[tuple[str, str], Reason | None] = {}

    def refresh(self) -> None:
        """Forget what was discovered and loaded, after distributions were installed or removed."""
        with self._lock:
            self._reset()

    @contextmanager
    def temporary_entry_points(self, entry_points: Sequence[EntryPointLike]) -> Iterator[None]:
        """Register further entry points inside the block, for tests and notebooks."""
        with self._lock:
            self._extra.extend(entry_points)
            self._reset()
        try:
            yield
        finally:
            with self._lock:
                for entry_point in entry_points:
                    self._extra.remove(entry_point)
                self._reset()

    # ---- discovery: metadata only

    def claims(self, group: str) -> tuple[tuple[str, Claim], ...]:
        """Return (name, claim) of every entry point of a group, whatever the variables say."""
        with self._lock:
            if group not in self._claims:
                found = [*self._entry_points(group), *(point for point in self._extra if point.group == group)]
                self._claims[group] = tuple((point.name, _claim(point)) for point in found)
            return self._claims[group]

    def records(self, environment: EnvironmentSnapshot | None = None) -> dict[str, Record]:
        """Return the discovered backends by name, in alphabetical order; imports nothing."""
        environment = environment or read_environment()
        enabled: dict[str, list[Claim]] = {}
        disabled: dict[str, list[tuple[Claim, str]]] = {}
        for key, claim in self.claims(BACKENDS_GROUP):
            variable = disabling_variable(claim.distribution, environment)
            name = canonical_name(key)
            if variable is None:
                enabled.setdefault(name, []).append(claim)
            else:
                disabled.setdefault(name, []).append((claim, variable))
        return {
            name: Record(name, tuple(enabled.get(name, ())), tuple(disabled.get(name, ())))
            for name in sorted({*enabled, *disabled})
        }

    def distributions(self) -> dict[str, str]:
        """Return name and version of every distribution that registers something, in alphabetical order."""
        claims = [claim for group in (BACKENDS_GROUP, PLUGINS_GROUP) for _, claim in self.claims(group)]
        return {claim.distribution: claim.version for claim in sorted(claims, key=lambda claim: claim.distribution)}

    # ---- names

    def resolve(self, name: AttentionBackendEnum | str, *, asked_by: str = "") -> str:
        """Return the backend name that a name or alias in any case stands for.

        Args:
            name: What the user wrote.
            asked_by: Who wrote it, for the message ("ATTNMUX_BACKEND").

        Raises:
            UnknownBackendError: Neither known nor discovered; names the closest ones.
            PluginConflictError: Two backends have this alias.
        """
        canonical = canonical_name(name)
        records = self.records()
        if canonical in records or canonical in AttentionBackendEnum.__members__:
            return canonical
        owners = [record.name for record in records.values() if canonical in self._aliases(record)]
        if len(owners) == 1:
            return owners[0]
        if owners:
            raise PluginConflictError(
                f"alias {canonical!r} belongs to {' and '.join(owners)}; write one of these names instead"
            )
        from difflib import get_close_matches

        aliases = [alias for record in records.values() for alias in self._aliases(record)]
        known = sorted({*records, *AttentionBackendEnum.__members__, *aliases})
        close = get_close_matches(canonical, known, n=3, cutoff=0.5)
        meant = f"Did you mean {' or '.join(close)}?" if close else f"Known names: {', '.join(known)}."
        written = f"{asked_by}={name!r}" if asked_by else repr(name)
        raise UnknownBackendError(
            f"unknown attention backend {written}: no installed distribution registers it and the core does not know it. "
            f"{meant} `attnmux list` shows what is installed."
        )

    def _aliases(self, record: Record) -> tuple[str, ...]:
        if len(record.enabled) != 1:
            return ()
        loaded = self._load_spec(record.name, record.claim)
        return loaded.aliases if isinstance(loaded, BackendSpec) else ()

    # ---- loading

    def spec(self, name: AttentionBackendEnum | str) -> BackendSpec:
        """Return a backend's spec; imports its spec module only.

        Args:
            name: Name or alias, in any case.

        Raises:
            UnknownBackendError: See `resolve`.
            BackendNotInstalledError: The core knows the name, and its distribution is not installed.
            BackendUnavailableError: A variable disables its distribution.
            PluginConflictError: Two distributions register it.
            PluginLoadError, PluginApiError: Its spec module raised, or broke the contract.
        """
        name = self.resolve(name)
        if name == _NO_ATTENTION.name:
            return _NO_ATTENTION
        record = self.records().get(name)
        if record is None:
            distribution = AttentionBackendEnum[name].distribution
            raise BackendNotInstalledError(
                f"attention backend {name!r} is in the distribution {distribution!r}, which is not installed. "
                f"Run: {install_command(name)}"
            )
        if record.is_conflict:
            raise PluginConflictError(conflict_text(record))
        if not record.enabled:
            raise BackendUnavailableError(disabled_text(record))
        loaded = self._load_spec(name, record.claim)
        if isinstance(loaded, LoadFailure):
            raise _load_error(loaded)
        return loaded

    def backend_class(self, name: AttentionBackendEnum | str) -> type[AttentionBackend]:
        """Return a backend's class, which imports its module.

        Raises:
            BackendUnavailableError: A requirement is missing or its probe says that it cannot run here.
            PluginLoadError, PluginApiError: Its module raised, or the class breaks the contract.
            AttnmuxError: As for `spec`.
        """
        spec = self.spec(name)
        obstacle = self.obstacle(spec)
        if obstacle is not None:
            raise BackendUnavailableError(f"attention backend {spec.name!r} cannot run here: {obstacle}")
        loaded = self._load_class(spec)
        if isinstance(loaded, LoadFailure):
            raise _load_error(loaded)
        return loaded

    def obstacle(self, spec: BackendSpec, *, run_probe: bool = True) -> Reason | None:
        """Return what keeps an installed backend from running on this machine: a requirement or its probe; else None.

        Args:
            spec: The backend's spec.
            run_probe: False leaves out a probe whose module is not imported yet, as listings do.
        """
        for requirement in spec.requires:
            if text := unmet_requirement(requirement):
                return Reason("requirement", text, f"pip install '{requirement}'")
        if spec.probe is None or not (run_probe or spec.probe.partition(":")[0] in sys.modules):
            return None
        key = (spec.name, spec.probe)
        with self._lock:
            if key not in self._obstacles:
                self._obstacles[key] = self._ask_probe(spec, spec.probe)
            return self._obstacles[key]

    def _ask_probe(self, spec: BackendSpec, probe: str) -> Reason | None:
        answer = self.guard(self._claim_of(spec), spec.name, "probe", lambda: import_target(probe)())
        if isinstance(answer, LoadFailure):
            return Reason("probe", f"its probe {probe} raised {answer.cause}")
        return answer if answer is None or isinstance(answer, Reason) else Reason("probe", str(answer))

    def _claim_of(self, spec: BackendSpec) -> Claim:
        record = self.records().get(spec.name)
        return record.claim if record else Claim(CORE_DISTRIBUTION, "", _NoEntryPoint())

    def check_strict(self, environment: EnvironmentSnapshot) -> None:
        """With ATTNMUX_STRICT, load every spec and raise what the first broken plugin raised."""
        if not environment.is_strict:
            return
        for record in self.records(environment).values():
            for claim in record.enabled:
                self._load_spec(record.name, claim)
        if self.failures:
            failure = self.failures[0]
            raise _load_error(failure, f" ({ENV_STRICT} is set, so that a broken plugin stops everything)")

    def record_failure(self, claim: Claim, name: str, phase: str, error: BaseException) -> LoadFailure:
        """Note that a plugin raised, and return the note."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        failure = LoadFailure(claim.distribution, claim.version, name, phase, error, text)
        self.failures.append(failure)
        return failure

    def _load_spec(self, name: str, claim: Claim) -> BackendSpec | LoadFailure:
        key = (claim.distribution, name)
        with self._lock:
            if key not in self._specs:
                spec = self.guard(claim, name, "import", claim.entry_point.load)
                if not isinstance(spec, LoadFailure):
                    key_name, owner = claim.entry_point.name, str(claim)
                    spec = self.guard(claim, name, "contract", partial(checked_spec, spec, key_name, owner))
                self._specs[key] = spec
            return self._specs[key]

    def _load_class(self, spec: BackendSpec) -> type[AttentionBackend] | LoadFailure:
        claim = self._claim_of(spec)
        key = (claim.distribution, spec.name)
        with self._lock:
            if key not in self._classes:
                found = self.guard(claim, spec.name, "backend", lambda: import_target(spec.target))
                if not isinstance(found, LoadFailure):
                    found = self.guard(claim, spec.name, "contract", partial(checked_class, found, spec))
                self._classes[key] = found
            return self._classes[key]

    def guard(self, claim: Claim, name: str, phase: str, call: Callable[[], Any]) -> Any:
        """Call into a plugin; whatever it raises becomes the LoadFailure that is returned."""
        try:
            return call()
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a plugin may raise SystemExit or worse; one must not break others
            return self.record_failure(claim, name, phase, error)


class _NoEntryPoint:
    name = value = group = ""
    dist: DistributionLike | None = None

    def load(self) -> Any:
        raise AssertionError("the core's own NO_ATTENTION has no entry point")


_registry = Registry()


def get_registry() -> Registry:
    """Return the registry of this process."""
    return _registry


def normalized(distribution: str) -> str:
    """Return a distribution's name as PEP 503 compares it."""
    from packaging.utils import canonicalize_name

    return canonicalize_name(distribution.strip())


def listed_distributions(value: str | None) -> frozenset[str]:
    """Return the normalised names in a comma-separated variable."""
    return frozenset(normalized(item) for item in (value or "").split(",") if item.strip())


def disabling_variable(distribution: str, environment: EnvironmentSnapshot) -> str | None:
    """Return the variable that rules a distribution out, as it would be written in a shell, or None."""
    name = normalized(distribution)
    if name == CORE_DISTRIBUTION:
        return None
    if name in listed_distributions(environment.disable_plugins):
        return f"{ENV_DISABLE_PLUGINS}={environment.disable_plugins}"
    if environment.plugins is not None and name not in listed_distributions(environment.plugins):
        return f"{ENV_PLUGINS}={environment.plugins}"
    return None


def install_command(name: str) -> str:
    """Return the pip command that installs a backend the core knows."""
    return f"pip install {AttentionBackendEnum[name].distribution}"


def conflict_text(record: Record) -> str:
    """Return the message for a name that several distributions register."""
    claims = " and ".join(str(claim) for claim in record.enabled)
    return (
        f"attention backend {record.name!r} is registered by {claims}; neither is used. Uninstall one, or name the one "
        f"to keep: {ENV_PLUGINS}={record.enabled[0].distribution}"
    )


def disabled_text(record: Record) -> str:
    """Return the message for a backend that a variable rules out."""
    claim, variable = record.disabled[0]
    return f"attention backend {record.name!r} of {claim} is disabled by {variable}; change that variable to use it"


def _claim(entry_point: EntryPointLike) -> Claim:
    dist = entry_point.dist
    return Claim(dist.name if dist else "unknown", dist.version if dist else "", entry_point)


def _load_error(failure: LoadFailure, note: str = "") -> PluginLoadError:
    owner = f"{failure.distribution} {failure.version}".strip()
    kind = PluginApiError if isinstance(failure.error, PluginApiError) else PluginLoadError
    error = kind(
        f"attention backend {failure.name!r} of {owner} cannot be loaded ({failure.phase}): {failure.cause}{note}. "
        "`attnmux doctor` shows the traceback; repair or uninstall that distribution."
    )
    error.__cause__ = failure.error
    return error
