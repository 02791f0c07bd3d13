"""Files that are either the old one or the whole new one, never a half."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from sorted_kernels.errors import CheckpointError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it over ``path`` at the end.

    Missing folders are made. Where the body raises, ``path`` stays as it was. The temporary name
    keeps the suffix, by which matplotlib chooses a format.

    Raises:
        CheckpointError: The file or its folder cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"path {str(target)!r} cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
