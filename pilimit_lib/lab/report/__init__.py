"""One self-contained HTML page about a run: nothing is fetched from a network, nothing is
executed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...core.files import write_text
from .data import RunView
from .page import page

if TYPE_CHECKING:
    from ..watch import Lab

__all__ = ["RunView", "write_folder_report", "write_report"]


def write_report(lab: Lab, path: str | Path) -> Path:
    """The page about the lab's run as it stands now."""
    write_text(Path(path), page(RunView.of(lab)))
    return Path(path)


def write_folder_report(
    folder: str | Path, path: str | Path | None = None, checkpoint_id: int | None = None
) -> Path:
    """The page about a run's folder, with ledger and neurons of one checkpoint (default: the
    newest)."""
    target = Path(folder) / "report.html" if path is None else Path(path)
    write_text(target, page(RunView.of_folder(Path(folder), checkpoint_id)))
    return target
