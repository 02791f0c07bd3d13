"""The command line ``sorted-kernels``."""

from __future__ import annotations

import sys
from typing import Any

from sorted_kernels.errors import SortedKernelsError

DONE, USAGE, INTERRUPTED = 0, 2, 130
_DEBUG = "--debug"


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 unexpected, 2 wrong usage or input, 130 interrupted.

    Args:
        arguments: In place of those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = _DEBUG in given
    try:
        from sorted_kernels.cli.app import app
    except ImportError as error:
        print(
            f"error: {error.name or error} is needed by the command line; "
            "pip install 'sorted_kernels[cli]' brings it",
            file=sys.stderr,
        )
        raise SystemExit(USAGE) from error
    import typer

    usage_error: Any = typer.BadParameter.__base__  # wherever this typer has it from
    try:
        # Not "standalone", so that every failure takes the road below.
        code = app(args=[text for text in given if text != _DEBUG], standalone_mode=False)
    except SortedKernelsError as error:
        if debug:
            raise
        _fail(str(error), USAGE)
    except usage_error as error:
        _fail(error.format_message(), USAGE)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", INTERRUPTED)
    if code == INTERRUPTED:  # some versions of typer catch it themselves
        _fail("interrupted", INTERRUPTED)
    raise SystemExit(code or DONE)


def _fail(message: str, code: int) -> None:
    if message:  # there is none where a bare command has shown its help
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
