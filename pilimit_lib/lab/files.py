"""Small text files that are either whole or not there."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader never sees half of it, and a full disk leaves the old
    file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # opened plainly, so that it gets the usual permissions
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, for plain data."""
    write_text(path, json.dumps(value, indent=1))
