"""The command line: `attnmux`, also `python -m attnmux`.

Exit status: 0 success, 2 usage error, 1 anything else. An error is one paragraph on stderr; `--debug` adds the traceback.
With `--json` stdout carries one JSON document and nothing else; an error is then `{"error": {"type", "message"}}`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: Arguments without the program's name; None = those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # taken out here, so that it is understood before and after the command's name
    is_debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(arguments)
    except Exception as error:
        # whatever it is, a user gets a paragraph, and the traceback on request
        if is_debug:
            raise
        from attnmux.cli.output import print_error

        print_error(error, as_json="--json" in arguments)
        return 1


def _run(arguments: list[str]) -> int:
    from typer.main import get_command

    from attnmux.cli.app import COMMANDS, build_app

    app = build_app()
    command = next((word for word in arguments if not word.startswith("-")), None)
    # hook modules may import anything, so they are loaded only where the command is not one of our own
    if command not in COMMANDS and "--version" not in arguments:
        _add_hook_commands(app)
    try:
        get_command(app)(args=arguments, prog_name="attnmux")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def _add_hook_commands(app: typer.Typer) -> None:
    """Let installed distributions add commands; one that raises is recorded for `attnmux doctor`."""
    from attnmux.hooks import get_hook_runner
    from attnmux.registry import get_registry
    from attnmux.settings import read_environment

    get_hook_runner(get_registry(), read_environment()).call("attnmux_cli", app=app)
