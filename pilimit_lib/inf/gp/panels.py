"""Finished panels of a Cholesky factor in a folder, from which an interrupted one goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from torch import Tensor

from ...core import load, save, write_text
from .digest import digest_of


class Panels:
    """Panels of the factor of K + shift·I [a a], `width` columns each, in `folder`.

    A panel is its diagonal block L [b b] in float64 and what lies below it [rest b] in K's type.
    The folder knows which matrix they belong to: where that is another one, they are removed, since
    a factor costs time only.
    """

    def __init__(self, folder: str | os.PathLike, K: Tensor, shift: float, width: int) -> None:
        self.folder = Path(folder)
        identity = {"matrix": _digest(K, width), "shift": shift, "width": width}
        note = self.folder / "factor.json"
        if not note.is_file() or note.read_text(encoding="utf-8") != json.dumps(identity):
            self.remove()
            self.folder.mkdir(parents=True)
            write_text(note, json.dumps(identity))

    def get(self, begin: int) -> tuple[Tensor, Tensor] | None:
        """The panel that begins at this column, if it was finished."""
        path = self._path(begin)
        if not path.is_file():
            return None
        try:
            found = load(path)
        except ValueError:  # damaged: it is made again
            return None
        return found["diagonal"], found["below"]

    def put(self, begin: int, diagonal: Tensor, below: Tensor) -> None:
        save({"diagonal": diagonal, "below": below.clone()}, self._path(begin))

    def remove(self) -> None:
        """All panels: the solution is there, or they belong to another matrix."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, begin: int) -> Path:
        return self.folder / f"panel_{begin:09d}.pt"


def _digest(K: Tensor, width: int) -> str:
    """A digest of the upper block triangle, which is K itself also while it is factorised."""
    return digest_of([digest_of(K[j : j + width, j:]) for j in range(0, len(K), width)])
