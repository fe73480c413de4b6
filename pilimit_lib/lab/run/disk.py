"""Writing to a folder that others may be writing to, and that may be full."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    from fcntl import LOCK_EX, flock
except ImportError:  # Windows: ids stay exclusive, an index written at the same instant may not
    LOCK_EX = 0

    def flock(file: IO, operation: int) -> None:
        """Nothing is locked."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the `with` nobody else holds the folder's lock. The system lets go of it when the
    holder dies."""
    with (folder / ".lock").open("a") as file:
        flock(file, LOCK_EX)
        yield


def reason(error: BaseException) -> str:
    """Why something could not be written; a full disk is called that, whatever hid it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return f"the disk is full: {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    return str(error)
