"""Exceptions of attnmux.

    AttnmuxError
    ├── UnknownBackendError       (LookupError)   a name that is neither known nor discovered
    ├── BackendNotInstalledError  (ImportError)   a known name whose distribution is missing
    ├── BackendUnavailableError   (ImportError)   a requirement, a probe or a variable keeps it from running here
    ├── UnsupportedRequestError   (ValueError)    the backend or layer cannot honour what was asked
    ├── PluginLoadError           (ImportError)   a plugin raised while it was loaded; the original is the cause
    │   └── PluginApiError        (TypeError)     not a BackendSpec, a wrong API number, a wrong name, a missing method
    ├── PluginConflictError       (LookupError)   two distributions claim one name
    ├── MissingPackageError       (ImportError)   an optional package that a command or helper needs is not installed
    ├── ForwardContextError       (RuntimeError)  no forward context where one is needed
    └── SequenceParallelError     (RuntimeError)  ranks disagree, or one of them did not come

Every message says what was asked, what came, why it cannot be, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnmux.report import SelectionReport
    from attnmux.spec import Reason

__all__ = [
    "AttnmuxError",
    "BackendNotInstalledError",
    "BackendUnavailableError",
    "ForwardContextError",
    "MissingPackageError",
    "PluginApiError",
    "PluginConflictError",
    "PluginLoadError",
    "SequenceParallelError",
    "UnknownBackendError",
    "UnsupportedRequestError",
]


class AttnmuxError(Exception):
    """Base of every exception that attnmux raises on purpose."""

    report: SelectionReport | None = None
    """The selection report at the time of the error, where a selection was under way."""

    def reasons_about(self, backend: str) -> str:
        """Return on one line what the report says against a backend; without a report, the message."""
        rows = self.report.candidates if self.report is not None else ()
        reasons = next((row.reasons for row in rows if row.backend == backend), ())
        return "; ".join(map(str, reasons)) or str(self)


class UnknownBackendError(AttnmuxError, LookupError):
    """A backend name that the core does not know and no installed distribution registers."""


class BackendNotInstalledError(AttnmuxError, ImportError):
    """A backend that the core knows by name, whose distribution is not installed."""


class BackendUnavailableError(AttnmuxError, ImportError):
    """An installed backend that cannot run here: a requirement, its probe, or a disabling variable."""


class UnsupportedRequestError(AttnmuxError, ValueError):
    """A request or call that cannot be honoured; `reasons` holds every one that was found."""

    def __init__(self, message: str, reasons: Sequence[Reason] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)


class PluginLoadError(AttnmuxError, ImportError):
    """A plugin that raised while it was imported; the original exception is `__cause__`."""


class PluginApiError(PluginLoadError, TypeError):
    """A plugin that loads but breaks the plugin contract."""


class PluginConflictError(AttnmuxError, LookupError):
    """Two distributions that register one backend name; neither is used."""


class MissingPackageError(AttnmuxError, ImportError):
    """An optional package is not installed; the message has the pip command."""


class ForwardContextError(AttnmuxError, RuntimeError):
    """No forward context is active where one is needed."""


class SequenceParallelError(AttnmuxError, RuntimeError):
    """Ranks disagree about what to exchange, or one of them failed or did not come; names the group, operation and rank."""
