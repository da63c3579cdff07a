"""Optional behaviour that a distribution may add: pluggy hooks, called when a backend is selected, never per forward.

A distribution names a module in the entry-point group `attnmux.plugins`; the module carries functions marked with
`attnmux.hookspecs.hookimpl`:

    from attnmux.hookspecs import hookimpl

    @hookimpl
    def attnmux_veto(request, backend):
        if backend == "FLASH_ATTN" and request.role == "vae":
            return "not on the VAE"

A hook that raises is recorded (`attnmux doctor` shows it) and counts as not having answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

    from attnmux.report import SelectionReport
    from attnmux.spec import AttentionRequest

__all__ = ["PROJECT", "AttnmuxHooks", "hookimpl"]

PROJECT = "attnmux"
_hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function as the implementation of the hook of that name."""


class AttnmuxHooks:
    """Signatures of the hooks."""

    @_hookspec(firstresult=True)
    def attnmux_rank(self, request: AttentionRequest, candidates: Sequence[str]) -> Sequence[str] | None:
        """Return the candidates of an automatic choice, best first; None leaves the order to others.

        Names that are left out follow in their old order; names that are not candidates are ignored.
        """

    @_hookspec
    def attnmux_veto(self, request: AttentionRequest, backend: str) -> str | None:
        """Return why this backend must not serve this request, or None; it binds explicit choices too."""

    @_hookspec
    def attnmux_selected(self, report: SelectionReport) -> None:
        """Take note of a selection that was made; called once per distinct request, not for cached ones."""

    @_hookspec
    def attnmux_cli(self, app: typer.Typer) -> None:
        """Add commands to the `attnmux` command line."""
