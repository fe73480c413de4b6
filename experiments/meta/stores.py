"""Tables of a run: one JSON line per row in `<table>.jsonl`, and on request the same tables as a
cox store.

Table names: metadata (one row, the settings), train (one row per epoch), val (one row per epoch),
test (one row per test).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from pilimit_lib.core import write_text

Records = list[dict[str, Any]]
TABLES = ("metadata", "train", "val", "test")


def write_tables(folder: Path, tables: dict[str, Records], cox: bool = False) -> None:
    """Write whole tables, so that a resumed run never repeats or tears a row."""
    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise ValueError(f"there is no table {', '.join(unknown)}; a run has {', '.join(TABLES)}")
    for name, records in tables.items():
        write_text(
            folder / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records)
        )
    if cox:
        _write_cox(folder, tables)


def require_cox() -> Any:
    """The module cox.store, or an ImportError that says what to install."""
    try:
        import cox.store
    except ImportError as error:
        raise ImportError(
            f"--store cox needs cox and what it doesn't ask for ({error}): pip install "
            "'pilimit[cox]'"
        ) from error
    return cox.store


def _write_cox(folder: Path, tables: dict[str, Records]) -> None:
    """The tables in folder/cox, readable by cox.readers.CollectionReader.

    cox appends row by row to an HDF5 table whose text columns keep the length of the first row, so
    a longer text breaks it. Here each table is written whole, as wide as its longest text.
    """
    store_of = require_cox()
    store = store_of.Store(str(folder), "cox")
    try:
        for name, records in tables.items():
            if not records:
                continue
            frame = pd.DataFrame(
                [{key: _plain(value) for key, value in record.items()} for record in records]
            )
            for column in frame:
                if frame[column].map(lambda value: isinstance(value, float)).any():
                    # nothing among numbers
                    frame[column] = frame[column].replace("", math.nan).astype(float)
            schema = {column: _kind(frame[column]) for column in frame}
            texts = {
                column: int(frame[column].str.len().max()) + 1
                for column, kind in schema.items()
                if kind is str
            }
            if name in store.store:
                store.store.remove(name)
            store.store.append(
                name,
                frame.astype({column: object for column in texts}),
                format="table",
                min_itemsize=texts,
            )
            store.store.get_storer(name).attrs[store_of.COX_DATA_KEY] = {
                "schema": schema,
                "name": name,
            }
    finally:
        store.tensorboard.close()
        store.close()


def _plain(value: Any) -> Any:
    """What a column can hold: numbers and texts; nothing is an empty text."""
    if value is None:
        return ""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _kind(column: pd.Series) -> type:
    for kind, fits in (
        (bool, pd.api.types.is_bool_dtype),
        (int, pd.api.types.is_integer_dtype),
        (float, pd.api.types.is_float_dtype),
    ):
        if fits(column):
            return kind
    return str
