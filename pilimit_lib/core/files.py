"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the `with` it is renamed over `path`.

    A reader never sees half of the file, and on any error the old file stays and nothing is left
    beside it; a full disk is an OSError that says so. What a killed process left beside `path` is
    removed. The suffix is that of `path`, for writers that look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    # Not a file of `tempfile`: those can be read by their owner only, and keep that when they are
    # renamed.
    beside = path.with_name(
        f".{path.stem}.{_here()}-{os.getpid()}-{uuid.uuid4().hex}.part{path.suffix}"
    )
    try:
        yield beside
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        number = full_disk(error)
        if number is None:
            raise
        stays = (
            "the one that is there stays as it was" if path.exists() else "nothing is left of it"
        )
        raise OSError(
            number, f"the disk is full, so that this file was not written; {stays}", str(path)
        ) from error


def remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that no longer run have left beside `path`."""
    if os.name != "posix":
        return  # elsewhere there is no harmless way of asking whether a process runs
    pattern = f".{glob.escape(path.stem)}.{_here()}-*.part{glob.escape(path.suffix)}"
    for left in path.parent.glob(pattern):
        number = left.name.removeprefix(f".{path.stem}.{_here()}-").partition("-")[0]
        if number.isdecimal() and not _runs(int(number)):
            left.unlink(missing_ok=True)


def full_disk(error: BaseException) -> int | None:
    """The number of the system's error where there was no room for a file, else None. Torch's
    writer hides it behind an error of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return seen.errno
        seen = seen.__cause__ or seen.__context__
    return None


# No space on the device, none left of the user's share, a file larger than files may be.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _here() -> str:
    """This machine, as one of several that may share a folder."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # another user's; or no number of a process, so none of ours
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, indent: int = 1) -> None:
    """As `write_text`, for plain data."""
    write_text(path, json.dumps(value, indent=indent))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """As `write_text`, for bytes."""
    with replacing(path) as beside:
        beside.write_bytes(data)
