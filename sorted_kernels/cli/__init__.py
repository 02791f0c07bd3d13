"""The command line ``sorted-kernels``."""

from __future__ import annotations

import sys
from typing import Any

from sorted_kernels.errors import SortedKernelsError


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 unexpected, 2 wrong usage or input, 130 interrupted."""
    try:
        from sorted_kernels.cli.app import app
    except ImportError as error:
        print(
            f"error: {error.name or error} is needed by the command line; "
            "pip install 'sorted_kernels[cli]' brings it",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    import typer

    usage_error: Any = typer.BadParameter.__base__  # wherever this typer has it from
    try:
        # Not "standalone", so that every failure takes the road below.
        code = app(args=arguments, standalone_mode=False)
    except SortedKernelsError as error:
        _fail(str(error), 2)
    except usage_error as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    else:
        raise SystemExit(code or 0)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
