"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the `with` it is renamed over `path`.

    A reader never sees half of the file, and on any error, a full disk among them, the old file
    stays and nothing is left beside it. The suffix is that of `path`, for writers that look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not a file of `tempfile`: those can be read by their owner only, and keep that when they are
    # renamed.
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.part{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


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
