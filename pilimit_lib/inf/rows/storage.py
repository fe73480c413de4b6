"""How the rows of a layer are stored and what a state dict holds of them.

A state dict has `A` [m o], `Amult` [m], `B` [m r] and `origin` [m]. Rows in eight bits are `A` int8
with `A_scale` and `A_shift` [m], and so for B. Amult that was scaled lazily (weight decay) comes
with `Amult_raw` [m] and `Amult_factors` [blocks], from which training goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...core import Blocks
from ..entries import tensor_misfit
from ..numerics import accumulator
from .parameter import ROWS
from .quantized import QuantizedBlocks, codes_to_rows

SUFFIXES = {"A": ("_scale", "_shift"), "Amult": ("_raw", "_factors"), "B": ("_scale", "_shift")}
EXTRAS = tuple(name + suffix for name, suffixes in SUFFIXES.items() for suffix in suffixes)
FOLDED = tuple(f"folded.{name}" for name in ("V", "kappa", "rows", "error"))
LIMITS = ("limits.merged", "limits.error")
# What a state dict of rows may hold beside A, Amult, B; `layer_alpha` is the original's
# learning-rate multiplier of Amult, which is the optimiser's matter.
BESIDE = (*EXTRAS, "origin", "layer_alpha", *FOLDED, *LIMITS)
STORAGE = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)


_elsewhere: ContextVar[bool] = ContextVar("pilimit_rows_elsewhere", default=False)


@contextmanager
def rows_elsewhere() -> Iterator[None]:
    """Inside the `with`, state dicts leave rows out and loading leaves them alone: they are kept in
    other files."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def elsewhere() -> bool:
    return _elsewhere.get()


def new_blocks(
    name: str, tail: tuple[int, ...], row_dtype: torch.dtype, device: torch.device | str | None
) -> Blocks:
    """Storage for A, Amult or B; Amult is never kept below float32, or small steps would vanish."""
    if row_dtype not in STORAGE:
        raise ValueError(
            f"row_dtype is {row_dtype}; rows can be kept in {', '.join(map(str, STORAGE))}"
        )
    if name == "Amult":
        return Blocks(tail, dtype=accumulator(row_dtype), device=device)
    if row_dtype == torch.int8:
        return QuantizedBlocks(tail, device=device)
    return Blocks(tail, dtype=row_dtype, device=device)


def pop_rows(state: dict, prefix: str) -> dict[str, dict[str, Tensor]]:
    """Take all that concerns rows out of a state dict: by name, what `Blocks.load_state` reads.
    Absent names are left out."""
    found = {}
    for name in ROWS:
        pieces = {
            suffix: state.pop(prefix + name + suffix, None) for suffix in ("", *SUFFIXES[name])
        }
        if pieces[""] is not None:
            found[name] = {
                suffix: piece.detach() for suffix, piece in pieces.items() if piece is not None
            }
    return found


def codes_misfit(pieces: Mapping[str, Tensor], name: str) -> str | None:
    """What keeps rows in eight bits from being read: their scales and shifts are not there, or of
    another number."""
    value = pieces[""]
    if value.dtype != torch.int8:
        if any(suffix in pieces for suffix in SUFFIXES["A"]):
            return f"{name} holds {value.dtype}, but comes with the scales of rows in eight bits"
        return None
    shapes = {
        suffix: list(pieces[suffix].shape) if suffix in pieces else None for suffix in SUFFIXES["A"]
    }
    if any(shape != [len(value)] for shape in shapes.values()):
        return (
            f"{name} has {len(value)} rows in eight bits, but scales and shifts of shapes {shapes}"
        )
    return None


def pieces_of(state: Mapping[str, Any], prefix: str, name: str) -> dict[str, Any]:
    """What a state dict holds of A, Amult or B, by suffix."""
    suffixes = (suffix for suffix in ("", *SUFFIXES[name]) if prefix + name + suffix in state)
    return {suffix: state[prefix + name + suffix] for suffix in suffixes}


def rows_misfits(
    state: Mapping[str, Any], prefix: str, r: int, r_out: int, strict: bool
) -> Iterator[str]:
    """Why the rows of a state dict are none of rank `r` and `r_out` outputs."""
    tails = {"A": [r_out], "Amult": [], "B": [r]}
    counts = {}
    for name, tail in tails.items():
        key = prefix + name
        if key not in state:
            if strict:
                yield f"{key} is missing"
            continue
        pieces = pieces_of(state, prefix, name)
        codes = name != "Amult" and getattr(state[key], "dtype", None) == torch.int8
        found = [
            tensor_misfit(value, key + suffix, whole=codes and not suffix)
            for suffix, value in pieces.items()
        ]
        if any(found):
            yield from filter(None, found)
            continue
        shape = list(state[key].shape)
        if len(shape) != 1 + len(tail) or shape[1:] != tail:
            yield f"{key} has shape {shape}; expected {['rows', *tail]}"
            continue
        counts[name] = shape[0]
        misfit = codes_misfit(pieces, key)
        if misfit:
            yield misfit
    if prefix + "origin" in state:
        misfit = tensor_misfit(state[prefix + "origin"], prefix + "origin", ndim=1, whole=True)
        if misfit:
            yield misfit
        else:
            counts["origin"] = len(state[prefix + "origin"])
    if len(set(counts.values())) > 1:
        yield f"{prefix[:-1]} has rows of different number: {counts}"


def storage_misfit(rows: Tensor, storage: torch.dtype, name: str) -> str | None:
    """What keeps `rows` from being stored so: numbers that would become Inf."""
    if (
        rows.is_meta
        or rows.dtype == storage
        or not storage.is_floating_point
        or not bool((rows.isfinite() & rows.to(storage).isinf()).any())
    ):
        return None
    return (
        f"{name} has numbers up to {float(rows[rows.isfinite()].abs().max()):g}, rows in {storage} "
        "hold at most "
        f"{torch.finfo(storage).max:g}; keep rows in bfloat16 or float32"
    )


def as_rows(pieces: dict[str, Tensor], name: str) -> Tensor:
    """The rows [m, …] that the pieces of a state dict stand for; ValueError where they do not
    belong together."""
    misfit = codes_misfit(pieces, name)
    if misfit:
        raise ValueError(misfit)
    return codes_to_rows(pieces)
