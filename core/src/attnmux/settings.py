"""What users set outside the call: environment variables, the process-wide force, the scoped choice.

| variable                | meaning                                                                                       |
|-------------------------|-----------------------------------------------------------------------------------------------|
| ATTNMUX_BACKEND         | backend of every layer that names none itself; any case; an unknown name is an error          |
| ATTNMUX_PLUGINS         | comma-separated distributions that may register backends; the core is always allowed          |
| ATTNMUX_DISABLE_PLUGINS | comma-separated distributions that may not                                                    |
| ATTNMUX_STRICT          | 1: a plugin that fails to load raises at once, whichever backend was asked for                |
| ATTNMUX_DIST_CHECK      | 1: ranks that share a sequence compare what they exchange on every call, not once per kind    |
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from attnmux.errors import UnsupportedRequestError
from attnmux.spec import AttentionBackendEnum, backend_name_to_enum, canonical_name

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ENV_BACKEND",
    "ENV_DISABLE_PLUGINS",
    "ENV_DIST_CHECK",
    "ENV_PLUGINS",
    "ENV_STRICT",
    "VARIABLES",
    "EnvironmentSnapshot",
    "get_env_variable_attn_backend",
    "get_global_forced_attn_backend",
    "global_force_attn_backend",
    "global_force_attn_backend_context_manager",
    "read_environment",
    "scoped_backend",
    "use_backend",
]

ENV_BACKEND = "ATTNMUX_BACKEND"
ENV_PLUGINS = "ATTNMUX_PLUGINS"
ENV_DISABLE_PLUGINS = "ATTNMUX_DISABLE_PLUGINS"
ENV_STRICT = "ATTNMUX_STRICT"
ENV_DIST_CHECK = "ATTNMUX_DIST_CHECK"
VARIABLES = (ENV_BACKEND, ENV_PLUGINS, ENV_DISABLE_PLUGINS, ENV_STRICT, ENV_DIST_CHECK)

_FALSE = frozenset({"", "0", "false", "no", "off"})
_TRUE = frozenset({"1", "true", "yes", "on"})


class EnvironmentSnapshot(NamedTuple):
    """Raw values of `VARIABLES`, None where unset or blank; hashable, so that caches can be keyed on it."""

    backend: str | None
    plugins: str | None
    disable_plugins: str | None
    strict: str | None
    dist_check: str | None = None

    @property
    def is_strict(self) -> bool:
        """Whether a plugin that fails to load raises at once.

        Raises:
            UnsupportedRequestError: The variable holds neither a true nor a false word.
        """
        return _truth(ENV_STRICT, self.strict)

    @property
    def checks_every_exchange(self) -> bool:
        """Whether ranks that share a sequence compare what they exchange on every call.

        Raises:
            UnsupportedRequestError: The variable holds neither a true nor a false word.
        """
        return _truth(ENV_DIST_CHECK, self.dist_check)


def _truth(variable: str, value: str | None) -> bool:
    word = (value or "").strip().lower()
    if word not in _FALSE | _TRUE:
        raise UnsupportedRequestError(f"{variable}={value!r} is neither true nor false; set it to 1 or 0")
    return word in _TRUE


# A look-up in os.environ of a variable that is not set raises inside and takes about a microsecond; five of them would
# double the cost of a cached selection. The dictionary beneath takes 40 ns each.
_environ: Any = getattr(os.environ, "_data", os.environ)
_encode = os.environ.encodekey if _environ is not os.environ else str
_KEYS = tuple(_encode(name) for name in VARIABLES)


def raw_environment() -> tuple[object, ...]:
    """Return the variables as the operating system holds them: a cheap key that changes whenever they do."""
    get = _environ.get
    return (get(_KEYS[0]), get(_KEYS[1]), get(_KEYS[2]), get(_KEYS[3]), get(_KEYS[4]))


def read_environment() -> EnvironmentSnapshot:
    """Return the values of the variables at this moment."""
    values = (os.environ.get(name) for name in VARIABLES)
    return EnvironmentSnapshot(*(value if value and value.strip() else None for value in values))


def get_env_variable_attn_backend() -> AttentionBackendEnum | None:
    """Return the member that ATTNMUX_BACKEND names; None if it is unset or names an out-of-tree backend.

    The selector is stricter than this function: there a name that is neither known nor discovered is an error.
    """
    name = read_environment().backend
    return None if name is None else backend_name_to_enum(name)


class _Forced:
    """The process-wide choice; one object so that no function needs `global`."""

    backend: AttentionBackendEnum | str | None = None


_scope: ContextVar[str | None] = ContextVar("attnmux_backend_scope", default=None)


def global_force_attn_backend(attn_backend: AttentionBackendEnum | str | None) -> None:
    """Choose the backend of every layer built from here on in this process; None takes the choice back.

    Args:
        attn_backend: Member or name, in any case. It is looked up when a layer is built, not here.

    Raises:
        UnsupportedRequestError: Neither a string, a member nor None.
    """
    _Forced.backend = _member_or_name(attn_backend)


def get_global_forced_attn_backend() -> AttentionBackendEnum | str | None:
    """Return what `global_force_attn_backend` set: a member, the name of an out-of-tree backend, or None."""
    return _Forced.backend


@contextmanager
def global_force_attn_backend_context_manager(attn_backend: AttentionBackendEnum | str | None) -> Iterator[None]:
    """Force a backend for the process inside the block; the previous value comes back, also when the block raises."""
    previous = _Forced.backend
    global_force_attn_backend(attn_backend)
    try:
        yield
    finally:
        _Forced.backend = previous


@contextmanager
def use_backend(name: AttentionBackendEnum | str | None) -> Iterator[None]:
    """Choose the backend of the layers built inside the block, in this thread or asyncio task only; nests.

    Args:
        name: Member or name, in any case; None lifts an outer block's choice.

    Raises:
        UnsupportedRequestError: Neither a string, a member nor None.
    """
    token = _scope.set(None if name is None else canonical_name(name))
    try:
        yield
    finally:
        _scope.reset(token)


def scoped_backend() -> str | None:
    """Return the name that the innermost `use_backend` block chose, or None."""
    return _scope.get()


def _member_or_name(backend: AttentionBackendEnum | str | None) -> AttentionBackendEnum | str | None:
    if backend is None:
        return None
    name = canonical_name(backend)
    return backend_name_to_enum(name) or name
