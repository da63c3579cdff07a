"""The typer application: which commands there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from attnmux.cli.bench import bench
from attnmux.cli.check import check
from attnmux.cli.demo import demo
from attnmux.cli.doctor import doctor
from attnmux.cli.explain import explain
from attnmux.cli.list_command import list_backends

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COMMANDS", "build_app"]

COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_backends,
    "explain": explain,
    "doctor": doctor,
    "check": check,
    "bench": bench,
    "demo": demo,
}


def build_app() -> typer.Typer:
    """Return a new application with the core's commands; distributions may add theirs to it."""
    app = typer.Typer(
        name="attnmux",
        help="One attention layer, many backends: see which are installed, why one is chosen, and what they do.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    for name, command in COMMANDS.items():
        app.command(name)(command)
    return app


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from attnmux import __version__

        typer.echo(f"attnmux {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Declare the options that come before a command; `main` takes out --debug itself."""
