"""What a training run will cost, before it starts: memory of rows or moments at its end, and
multiply-adds per epoch."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from ..cifar10.settings import Settings
from ..training.process import human_bytes


@dataclass(frozen=True)
class Cost:
    """Bytes of the layers at the end; multiply-adds of the first and of the last epoch; rows at the
    end (0: none)."""

    what: str
    bytes: int
    first_epoch: float
    last_epoch: float
    rows: int


def cost(settings: Settings, images: int, features: int, classes: int) -> Cost:
    """Of a run on so many training images with so many numbers each.

    Rows: every image adds one row to each of depth + 1 layers in every epoch, and each step walks
    all rows, forward and backward.
    """
    s = settings
    outputs = [s.r] * s.depth + [classes]
    first = 3 * images * features * s.r
    if s.width:
        weights = s.width * features + s.depth * s.width**2 + s.width * classes
        return Cost(
            f"finite network of width {s.width}",
            4 * weights,
            3 * images * weights,
            3 * images * weights,
            0,
        )
    if s.memory == "moments" and s.row_budget is None:
        P = comb(s.r + s.degree, s.degree)
        macs = first + 3 * images * P * sum(outputs)
        return Cost(f"moments of degree {s.degree}", 4 * P * sum(outputs), macs, macs, 0)
    per_number = 2 if s.cuda and not s.float else 4
    rows = s.r + s.epochs * images
    if s.row_budget is not None:
        rows = min(rows, s.row_budget)

    def epoch(number: int) -> float:
        seen = min(s.r + (number - 0.5) * images, rows)
        return first + 2 * images * seen * sum(s.r + o for o in outputs)

    return Cost(
        "exact rows",
        per_number * rows * sum(s.r + o for o in outputs),
        epoch(1),
        epoch(s.epochs),
        rows,
    )


def describe_cost(found: Cost) -> str:
    """One line for the user."""
    rows = f", {found.rows:,} rows in each layer" if found.rows else ""
    growing = (
        ""
        if found.first_epoch == found.last_epoch
        else f" in the first and {found.last_epoch:.2g} in the last"
    )
    return (
        f"this run, {found.what}: {human_bytes(found.bytes)} at the end{rows}; "
        f"{found.first_epoch:.2g} multiply-adds an "
        f"epoch{growing}"
    )
