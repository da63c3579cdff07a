"""The versions of other libraries that the integrations are tested with, and a clear word where another is installed."""

from __future__ import annotations

from importlib_metadata import PackageNotFoundError, version
from packaging.version import Version

from attnmux.errors import MissingPackageError

__all__ = ["LOWEST", "require"]

LOWEST = {"diffusers": "0.35", "transformers": "4.53"}
"""Lowest version of each library; the extra `integrations` asks for the same."""


def require(library: str) -> None:
    """Do nothing if a library is installed and new enough; it is not imported.

    Raises:
        MissingPackageError: It is not installed, or older than `LOWEST`; names what was found.
    """
    try:
        found = version(library)
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(LOWEST[library]):
        raise MissingPackageError(
            f"attnmux.integrations.{library} needs {library} >= {LOWEST[library]}, and "
            f"{'it is not installed' if found is None else f'{found} is installed'}. Run: pip install 'attnmux[integrations]'"
        )
