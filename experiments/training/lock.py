"""One process at a time in an output folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without such locks: two runs in one folder are not noticed there
    fcntl = None

NAME = ".lock"
TORN = re.compile(r"\..+\.[0-9a-f]{32}\.part(\.\w+)?")  # as pilimit_lib.core.replacing names them


@contextmanager
def only_process(folder: Path, flag: str = "--save-dir") -> Iterator[None]:
    """Inside the `with`, no other process gets into this `with` for the same folder; files that a
    killed one had not finished are removed.

    The lock file says who holds it. The system takes the lock from a process that ends in whatever
    way, so one that a killed run left behind holds nobody up. Raises FileExistsError where another
    process is inside; `flag` names the folder in it.
    """
    if fcntl is None:
        yield
        return
    path = folder / NAME
    lock = _open_locked(path, flag)
    try:
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        for torn in folder.glob(".*.part*"):
            if TORN.fullmatch(torn.name):
                torn.unlink()
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody else's can have that name
        os.close(lock)


def _open_locked(path: Path, flag: str) -> int:
    """A descriptor of the lock file at `path`, locked."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 20).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise FileExistsError(
                f"another process ({holder}) is writing to {path.parent}; wait for its end, or "
                f"choose another {flag}"
            ) from None
        # The holder before may have removed the file between our opening and locking it: then what
        # is locked is no longer the file at this path.
        try:
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)
