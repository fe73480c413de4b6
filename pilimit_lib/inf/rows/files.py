"""Checkpoints of networks whose rows do not fit into memory twice: a folder, written and read block
by block.

    state.pt         everything but rows, as `core.snapshot` gives it; sizes
    rank-0.pt …      per rank: what is small per row (Amult, origin, momentum, scales of codes)
    A.0.<layer> …    per rank: the stored numbers of A and B of each layer, one after the other

A folder written by k ranks loads on j. Rows of rank i are numbers i, i + k, i + 2k, … of the whole.
Files hold numbers and plain builtins only, so that nothing in them can be executed; state.pt has a
digest of each other one. How a folder is replaced and checked: see `folder`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core import Blocks, load, restore, save, snapshot
from .folder import (
    check_digests,
    check_sizes,
    check_small,
    digest_of_file,
    file_of,
    recover,
    replacing_folder,
    write_blocks,
)
from .layer import RowLayer, row_layers
from .storage import as_rows, rows_elsewhere

FORMAT = 1
MOMENTUM = "momentum_buffer"


@torch.no_grad()
def save_rows(
    model: nn.Module, folder: str | os.PathLike, optimizer: Optimizer | None = None, **extras: Any
) -> None:
    """Write `model` (and `optimizer`, and `extras`) into `folder`, whole or not at all; a folder
    that was there is replaced.

    Needs memory for one block of rows and for what is small per row. With sharded rows every rank
    calls it, on a shared folder.
    """
    folder, group = Path(folder), _Group(model)
    with group.together():
        if group.rank == 0:
            recover(folder)
    if folder.exists() and not (folder / "state.pt").is_file():
        raise FileExistsError(
            f"{folder} exists and is no checkpoint of rows; choose another folder"
        )
    with replacing_folder(folder, group.rank == 0, group.together) as beside:
        with group.together():
            found, digests = _write(model, beside, group, optimizer, extras)
        digests = group.joined(digests)
        with group.together():
            if group.rank == 0:
                save(found | {"digests": digests}, beside / "state.pt")


def _write(
    model: nn.Module,
    beside: Path,
    group: _Group,
    optimizer: Optimizer | None,
    extras: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write this rank's files; (what state.pt will hold, digests of these files)."""
    with rows_elsewhere():
        state = snapshot(model, optimizer, **extras)
    mine, sizes, digests = {}, {}, {}
    for name, layer in row_layers(model):
        mine[name] = _small(layer)
        momentum = (
            state.get("optimizer", {"state": {}})["state"].get(_amult(name), {}).pop(MOMENTUM, None)
        )
        mine[name] |= {} if momentum is None else {MOMENTUM: momentum}
        sizes[name] = {
            "rows": group.total(layer),
            "A": _kind(layer.A.blocks),
            "B": _kind(layer.B.blocks),
        }
        for role in ("A", "B"):
            path = beside / file_of(role, group.rank, name)
            parts = layer.row_storage(role).parts()
            digests[path.name] = write_blocks(path, (part.values for part in parts))
    rank_file = beside / f"rank-{group.rank}.pt"
    save(mine, rank_file)
    digests[rank_file.name] = digest_of_file(rank_file)
    return {"format": FORMAT, "ranks": group.size, "layers": sizes, "state": state}, digests


@torch.no_grad()
def load_rows(
    model: nn.Module, folder: str | os.PathLike, optimizer: Optimizer | None = None
) -> dict[str, Any]:
    """Bring `model` (and `optimizer`) to what `save_rows` wrote, block by block; returns the
    extras.

    The model needs the same constructor arguments, not the same number of rows, nor of ranks, nor
    the same storage of rows. Sizes and digests are checked before anything is changed, so that each
    file is read twice.
    """
    folder, group = Path(folder), _Group(model)
    with group.together():
        if group.rank == 0:
            recover(folder)
    layers = dict(row_layers(model))
    with group.together():
        found, small = _checked(folder, layers, group)
    state = found["state"]
    mine = {name: _of_rank(name, small, found["layers"][name]["rows"], group) for name in layers}
    for name in layers:
        momentum = mine[name].pop(MOMENTUM, None)
        if momentum is not None and optimizer is not None:
            state["optimizer"]["state"].setdefault(_amult(name), {})[MOMENTUM] = momentum
    with rows_elsewhere():
        extras = restore(model, state, optimizer)
    for name, layer in layers.items():
        sizes = found["layers"][name]
        for role in ("A", "B"):
            blocks = layer.row_storage(role)
            blocks.set(blocks.like())
            for numbers in _numbers(sizes["rows"], group, blocks.block_rows):
                pieces = _read(folder, role, name, sizes, found["ranks"], numbers)
                for suffix in ("_scale", "_shift"):
                    if role + suffix in mine[name]:
                        pieces[suffix] = mine[name][role + suffix][
                            len(blocks) : len(blocks) + len(numbers)
                        ]
                if pieces[""].dtype == torch.int8 and blocks.storage != torch.int8:
                    pieces = {"": as_rows(pieces, role)}
                blocks.extend(pieces)
        amult = {
            suffix: mine[name]["Amult" + suffix]
            for suffix in ("", "_raw", "_factors")
            if "Amult" + suffix in mine[name]
        }
        layer.Amult.blocks.load_state(amult)
        layer.origin_blocks.set(mine[name]["origin"])
        layer.pending.clear()
        if layer.shard is not None:
            layer.shard.total = sizes["rows"]
    return extras


def _checked(
    folder: Path, layers: dict[str, RowLayer], group: _Group
) -> tuple[dict[str, Any], list[dict]]:
    """(state.pt, what every rank's file holds), after all that could be wrong with the folder."""
    found = load(folder / "state.pt")
    if (
        not isinstance(found, dict)
        or found.get("format") != FORMAT
        or not {"ranks", "layers", "state"} <= set(found)
    ):
        raise ValueError(
            f"{folder} is not a checkpoint of rows in format {FORMAT}; plain checkpoints are read "
            "by core.load"
        )
    check_sizes(folder, found, layers)
    small = [load(folder / f"rank-{rank}.pt") for rank in range(found["ranks"])]
    check_small(folder, found["layers"], small, (MOMENTUM,))
    # What other ranks wrote is read here only if the ranks are not the same.
    ranks = [group.rank] if group.size == found["ranks"] else range(found["ranks"])
    check_digests(folder, found, ranks)
    return found, small


class _Group:
    """The ranks that hold the rows of a model: one, where they are not sharded."""

    def __init__(self, model: nn.Module) -> None:
        shards = [layer.shard for _, layer in row_layers(model)]
        if not shards:
            raise ValueError(
                f"{type(model).__name__} has no layer that keeps rows; use pilimit_lib.core.save "
                "and snapshot"
            )
        if len({shard is None for shard in shards}) > 1:
            raise RuntimeError(
                "some layers of the model are sharded and some are not; call shard_rows or "
                "gather_rows on it"
            )
        self.shard = shards[0]
        self.rank, self.size = (0, 1) if self.shard is None else (self.shard.rank, self.shard.size)

    def total(self, layer: RowLayer) -> int:
        return len(layer) if layer.shard is None else layer.shard.total

    @contextmanager
    def together(self) -> Iterator[None]:
        """Each rank does this part before any goes on, and the error of one is an error of all:
        otherwise the others would wait for it without end."""
        mine = None
        try:
            yield
        except BaseException as error:
            mine = error
            raise
        finally:
            said = None if mine is None else f"{type(mine).__name__}: {mine}"
            failed = {rank: text for rank, text in enumerate(self._from_all(said)) if text}
            if mine is None and failed:
                raise RuntimeError(
                    "stopped, since other ranks failed: "
                    + "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
                )

    def joined(self, entries: dict[str, str]) -> dict[str, str]:
        """The entries of all ranks."""
        return {name: value for held in self._from_all(entries) for name, value in held.items()}

    def _from_all(self, mine: Any) -> list[Any]:
        if self.shard is None:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.shard.group)
        return found


def _amult(name: str) -> str:
    return f"{name}.Amult" if name else "Amult"


def _kind(blocks: Blocks) -> dict[str, Any]:
    return {"dtype": blocks.storage, "width": blocks.tail[0]}


def _small(layer: RowLayer) -> dict[str, Tensor]:
    """Of a layer, all that has a few bytes per row."""
    found = {"Amult" + suffix: value for suffix, value in layer.Amult.blocks.state().items()} | {
        "origin": layer.origin
    }
    for role in ("A", "B"):
        for name in ("scale", "shift") if layer.row_storage(role).storage == torch.int8 else ():
            found[f"{role}_{name}"] = torch.cat(
                [
                    torch.zeros(0),
                    *(getattr(part, name).cpu() for part in layer.row_storage(role).parts()),
                ]
            )
    return found


def _of_rank(name: str, small: list[dict], rows: int, group: _Group) -> dict[str, Tensor]:
    """This rank's part of what is small per row, from that of the ranks that wrote."""
    if group.size == len(small):
        return dict(small[group.rank][name])
    found = {}
    for key in small[0][name]:
        if key in ("Amult_raw", "Amult_factors"):
            continue  # belong to blocks that are cut differently here
        whole = small[0][name][key].new_empty(rows)
        for rank, held in enumerate(small):
            whole[rank :: len(small)] = held[name][key]
        found[key] = whole[group.rank :: group.size].clone()
    return found


def _numbers(rows: int, group: _Group, at_once: int) -> Iterator[Tensor]:
    """Numbers of the rows of this rank, among those of all ranks, a block at a time."""
    for part in torch.arange(min(group.rank, rows), rows, group.size).split(at_once):
        if len(part):
            yield part


def _read(
    folder: Path, role: str, name: str, sizes: dict, ranks: int, numbers: Tensor
) -> dict[str, Tensor]:
    """Stored rows with these numbers, from the files of the ranks that wrote them."""
    kind = sizes[role]
    values = torch.empty(len(numbers), kind["width"], dtype=kind["dtype"])
    for rank in range(ranks):
        here = (numbers % ranks == rank).nonzero().squeeze(1)
        held = len(range(rank, sizes["rows"], ranks))
        if len(here):
            mapped = torch.from_file(
                str(folder / file_of(role, rank, name)),
                shared=False,
                size=held * kind["width"],
                dtype=kind["dtype"],
            )
            values[here] = mapped.view(held, kind["width"])[numbers[here] // ranks]
    return {"": values}
