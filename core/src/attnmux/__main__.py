"""Runs the command line: `python -m attnmux`."""

from __future__ import annotations

import sys

from attnmux.cli import main

if __name__ == "__main__":
    sys.exit(main())
