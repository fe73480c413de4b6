"""The folder of a checkpoint of rows: replaced whole or not at all, and checked before it is
used."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...core import full_disk
from .layer import RowLayer


def file_of(role: str, rank: int, name: str) -> str:
    """The file of the rows A or B of a layer that a rank wrote."""
    return f"{role}.{rank}.{name}"


@contextmanager
def replacing_folder(
    folder: Path, first: bool, together: Callable[[], AbstractContextManager]
) -> Iterator[Path]:
    """A folder beside `folder` to write to, by all ranks; at the end of the `with` it takes its
    place. `first`: whether this rank makes and moves folders; `together`: what no rank leaves
    before all have come to its end, and where one's error is all's.

    On any error the old folder stays and nothing is left beside it; what a killed run left there is
    removed. A full disk is an OSError that says so.
    """
    beside = _beside(folder, "part")
    try:
        with together():
            if first:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
        yield beside
        with together():
            if first:
                _move(beside, folder)
    except BaseException as error:
        if first:
            shutil.rmtree(beside, ignore_errors=True)
        number = full_disk(error)
        if number is None:
            raise
        stays = "the one that is there stays" if folder.exists() else "nothing is left of it"
        raise OSError(
            number,
            f"the disk is full, so that this checkpoint was not written; {stays}",
            str(folder),
        ) from error


def recover(folder: Path) -> None:
    """Put the checkpoint back that a run was killed over while it replaced it."""
    old = _beside(folder, "old")
    if not folder.exists() and old.exists():
        os.replace(old, folder)


def write_blocks(path: Path, blocks: Iterable[Tensor]) -> str:
    """Write the stored numbers of blocks of rows one after the other; returns their digest."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in blocks:
            stored = block.contiguous().view(-1).view(torch.uint8).cpu().numpy()
            digest.update(stored)
            file.write(memoryview(stored))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digests(folder: Path, found: dict, ranks: Iterable[int]) -> None:
    """Raise unless the files of `ranks` are those that were written with state.pt. Folders of
    earlier versions hold no digests."""
    noted = found.get("digests")
    if noted is None:
        return
    names = [f"rank-{rank}.pt" for rank in range(found["ranks"])]
    names += [
        file_of(role, rank, name) for name in found["layers"] for role in "AB" for rank in ranks
    ]
    for name in names:
        if digest_of_file(folder / name) != noted.get(name):
            raise ValueError(
                f"{folder / name} is not the file that was written with state.pt: it is damaged, "
                "or belongs to another checkpoint"
            )


def check_sizes(folder: Path, found: dict, layers: dict[str, RowLayer]) -> None:
    """Raise unless the files are as long as they should be and fit the layers."""
    if set(found["layers"]) != set(layers):
        raise ValueError(
            f"{folder} holds rows of the layers {sorted(found['layers'])}, the model has "
            f"{sorted(layers)}"
        )
    for name, sizes in found["layers"].items():
        for role in ("A", "B"):
            kind, expected = sizes[role], layers[name].row_storage(role).tail[0]
            if kind["width"] != expected:
                raise ValueError(
                    f"{folder}: rows {role} of '{name}' have {kind['width']} entries, here "
                    f"{expected}"
                )
            for rank in range(found["ranks"]):
                path = folder / file_of(role, rank, name)
                needed = (
                    len(range(rank, sizes["rows"], found["ranks"]))
                    * kind["width"]
                    * kind["dtype"].itemsize
                )
                size = path.stat().st_size if path.is_file() else None
                if size != needed:
                    raise ValueError(
                        f"{path} has {'no' if size is None else size} bytes, {needed} were "
                        "expected: it is damaged, or belongs to another checkpoint"
                    )
    for rank in range(found["ranks"]):
        if not (folder / f"rank-{rank}.pt").is_file():
            raise FileNotFoundError(
                f"{folder} lacks rank-{rank}.pt; copy the files of all {found['ranks']} ranks into "
                "it"
            )


def check_small(
    folder: Path, layers: dict[str, dict], small: list[dict], optional: tuple[str, ...]
) -> None:
    """Raise unless what each rank wrote per row is there for every row."""
    for name, sizes in layers.items():
        needed = ["Amult", "origin"] + [
            f"{role}_{piece}"
            for role in ("A", "B")
            for piece in ("scale", "shift")
            if sizes[role]["dtype"] == torch.int8
        ]
        needed += [key for key in optional if any(key in held.get(name, ()) for held in small)]
        for rank, held in enumerate(small):
            expected = len(range(rank, sizes["rows"], len(small)))
            for key in needed:
                value = held.get(name, {}).get(key)
                shape = list(value.shape) if isinstance(value, Tensor) else None
                if shape != [expected]:
                    raise ValueError(
                        f"{folder / f'rank-{rank}.pt'} holds {'no' if shape is None else shape} "
                        f"{key} of '{name}', "
                        f"{[expected]} were expected: it is damaged, or belongs to another "
                        "checkpoint"
                    )


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _move(beside: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(beside, folder)
        return
    old = _beside(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    try:
        os.replace(beside, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
