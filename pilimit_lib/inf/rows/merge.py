"""Rows in bounded memory: fold old ones into moments, merge those of the same sample.

A row of coefficient a (|Amult A|) that is replaced by something at distance ε in the kernel's
function space changes g_out by at most a · ε · √k(1) · s. Folding keeps the part of k up to degree
D and errs by a · |k - k_D| · s. Every operation reports such a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..dual.features import PolynomialFeatures
from ..dual.hermite import Series, hermite_series
from ..dual.relu import relu_k, relu_k_prime
from ..finite.activation import finite_moments
from ..moments.sums import update_
from .autograd import Rows, accumulator
from .storage import require_whole

if TYPE_CHECKING:
    from ..layers import InfPiLinearReLU

K1 = 0.5  # k(1) of ReLU


@dataclass(frozen=True)
class Report:
    """What an operation on rows did, and how far the layer may have moved.

    `output_bound`: no output g_out has changed by more than this times |g| (times 1 with layer
    norm). `gradient_bound`: the same for the norm of the Jacobian ∂g_out/∂g (times 1/|g| with layer
    norm). The last four are reported by `compress`: distance and size of the layer's function in
    the kernel's space, and relative changes of outputs and Jacobians at up to 256 of its rows.
    """

    action: str
    rows_before: int
    rows_after: int
    output_bound: float
    gradient_bound: float | None = None
    rkhs_error: float | None = None
    rkhs_norm: float | None = None
    output_change: float | None = None
    gradient_change: float | None = None


class FoldedRows(nn.Module):
    """Rows that were folded: their moments V [P o] up to a degree, how many they were, and a bound
    on what was lost."""

    def __init__(
        self,
        r: int,
        r_out: int,
        degree: int,
        fit: str,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.series: Series = hermite_series("relu", degree, fit)
        self.features = PolynomialFeatures(r, self.series.kappa)
        c = torch.linspace(-1, 1, 2001, dtype=torch.float64)
        slope = sum(j * kappa * c ** (j - 1) for j, kappa in enumerate(self.series.kappa) if j)
        self.slope_error = float((relu_k_prime(c) - slope).abs().max())
        self.register_buffer("V", torch.zeros(self.features.P, r_out, device=device, dtype=dtype))
        self.register_buffer("kappa", torch.tensor(self.series.kappa, dtype=torch.float64))
        self.register_buffer("rows", torch.zeros((), dtype=torch.long))
        self.register_buffer("error", torch.zeros((), dtype=torch.float64))

    def fold_(self, A: Tensor, Amult: Tensor, B: Tensor) -> float:
        """Take in rows A [m o], Amult [m], B [m r]; returns by how much the error bound rose."""
        A, Amult, B = (tensor.to(self.V) for tensor in (A, Amult, B))
        update_(self.features, self.V, B, A * Amult[:, None], 1.0)
        rise = float((torch.linalg.vector_norm(A, dim=1) * Amult.abs()).sum()) * self.series.error
        self.rows += len(A)
        self.error += rise
        return rise

    def reset_(self) -> None:
        """Forget all rows."""
        for buffer in (self.V, self.rows, self.error):
            buffer.zero_()

    def scale_(self, factor: float) -> None:
        """Weight decay of the folded rows."""
        self.V.mul_(factor)
        self.error.mul_(abs(factor))

    def finite_weight(self, omega: Tensor) -> Tensor:
        """Weights [o n] on ReLU units with ω [n r] whose limit is k_D: E[relu h_j] = a_j, so
        coefficients κ_j / a_j."""
        ratios = [
            kappa / a if kappa else 0.0 for kappa, a in zip(self.series.kappa, self.series.natural)
        ]
        return finite_moments(self.features, ratios, omega, self.V).T

    def _apply(self, fn, recurse: bool = True) -> FoldedRows:
        kept = self.kappa, self.error
        super()._apply(fn, recurse)
        # A conversion to half precision is meant for rows and weights; a bound and the kernel's
        # coefficients keep theirs.
        self.kappa, self.error = (old.to(self.V.device) for old in kept)
        self.V = self.V.to(accumulator(self.V.dtype))
        return self

    def _load_from_state_dict(
        self,
        state: dict[str, Any],
        prefix: str,
        metadata: dict,
        strict: bool,
        missing: list,
        unexpected: list,
        errors: list,
    ) -> None:
        """A checkpoint without folded rows has none."""
        if prefix + "V" not in state:
            for name, value in self.named_buffers():
                state[prefix + name] = self.kappa if name == "kappa" else torch.zeros_like(value)
        elif not torch.allclose(
            state[prefix + "kappa"].cpu(), self.kappa.cpu(), rtol=1e-6, atol=1e-9
        ):
            errors.append(
                f"{prefix}V: rows were folded with kernel coefficients "
                f"{state[prefix + 'kappa'].tolist()}, "
                f"here they are {self.kappa.tolist()}; use the same degree and fit"
            )
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


class RowLimits(nn.Module):
    """The settings `row_budget` and `merge` of a layer, applied at every step of PiSGD, and a tally
    of what they did."""

    def __init__(self, budget: int | None, merge: float | None) -> None:
        super().__init__()
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, int) or budget < 0
        ):
            raise ValueError(
                f"row_budget is {budget!r}; the number of newest rows to keep was expected, a "
                "whole number from 0"
            )
        if merge is not None:
            check_cosine(merge)
        self.budget, self.merge = budget, merge
        self.register_buffer("merged", torch.zeros((), dtype=torch.long))
        self.register_buffer("error", torch.zeros((), dtype=torch.float64))

    def reset_(self) -> None:
        """Start the tally anew."""
        self.merged.zero_()
        self.error.zero_()

    def check(self, rows: Rows, momentum: float) -> None:
        """Raise before a step that could not be made."""
        if momentum:
            raise ValueError(
                "a step with momentum goes on changing old rows, which row_budget and merge have "
                "folded or summed; "
                "use momentum=0, or memory='moments', where momentum is exact"
            )
        if self.merge is not None and bool((rows.origin < 0).any()):
            raise ValueError(
                "merge sums rows of the same sample, but the forward pass did not say which "
                "samples it was about; "
                "run it inside `with pilimit_lib.core.batch(ids)`"
            )

    @torch.no_grad()
    def absorb(self, layer: InfPiLinearReLU, rows: Rows, coefficient: float) -> Rows:
        """Add rows about to be appended with this Amult to rows of the same sample that agree;
        returns those left over."""
        if self.merge is None or not len(layer):
            return rows
        same = (layer.origin[None] == rows.origin[:, None].to(layer.origin.device)).nonzero()
        if not len(same):
            return rows
        new, old = same.unbind(1)
        B = rows.B.to(accumulator(rows.B.dtype))
        cosine = (B[new] * layer.B.blocks.select(old).to(B)).sum(1)
        usable = cosine > self.merge
        best = cosine.new_full((len(B),), -2.0).scatter_reduce_(
            0, new, torch.where(usable, cosine, -2.0), "amax"
        )
        chosen = usable & (cosine == best[new])
        # Of equally good rows only one receives the new one.
        target = torch.full((len(B),), -1, device=old.device).scatter_reduce_(
            0, new[chosen], old[chosen], "amax"
        )
        hit = target >= 0
        if not bool(hit.any()):
            return rows
        position, member = torch.unique(target[hit], return_inverse=True)
        amult = layer.Amult.blocks.select(position).to(B)
        a = torch.cat(
            [
                layer.A.blocks.select(position).to(B) * amult[:, None],
                coefficient * rows.A[hit].to(B),
            ]
        )
        directions = torch.cat([layer.B.blocks.select(position).to(B), B[hit]])
        total, mean, moved = combine(
            a, directions, torch.cat([torch.arange(len(position), device=member.device), member])
        )
        for name, value in zip(("A", "Amult", "B"), (*split(total), mean)):
            layer.row_storage(name).put(position, value)
        self.error += moved
        self.merged += int(hit.sum())
        return Rows(rows.A[~hit], rows.B[~hit], rows.origin[~hit.to(rows.origin.device)])

    @torch.no_grad()
    def enforce(self, layer: InfPiLinearReLU, decay: float) -> None:
        """After a step that scaled Amult by `decay`: the same to folded rows, then fold what
        exceeds the budget."""
        self.error.mul_(abs(decay))
        if layer.folded is not None and decay != 1:
            layer.folded.scale_(decay)
        if self.budget is not None and len(layer) > self.budget:
            fold(layer, self.budget)

    def _apply(self, fn, recurse: bool = True) -> RowLimits:
        error = self.error
        super()._apply(fn, recurse)
        self.error = error.to(self.merged.device)
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, value in self.named_buffers():
            state.setdefault(prefix + name, torch.zeros_like(value))
        super()._load_from_state_dict(state, prefix, *args)


@torch.no_grad()
def fold(layer: InfPiLinearReLU, keep: int) -> Report:
    """Fold all but the newest `keep` rows of `layer` into its moments `layer.folded`."""
    before, excess = len(layer), max(0, len(layer) - keep)
    index = torch.arange(excess, device=layer.device)
    rise = (
        layer.folded.fold_(
            *(getattr(layer, name).blocks.select(index) for name in ("A", "Amult", "B"))
        )
        if excess
        else 0.0
    )
    if excess:
        layer.axis.keep(torch.arange(excess, before))
    slope = layer.folded.slope_error / layer.folded.series.error
    return Report("fold", before, len(layer), rise, rise * math.hypot(1, slope))


@torch.no_grad()
def merge(layer: InfPiLinearReLU, cosine: float = 0.95) -> Report:
    """Sum rows made by the same sample whose directions have a cosine above `cosine` with the
    newest of their group.

    Rows of unknown origin are left alone. Momentum that an optimiser holds per row does not survive
    this.
    """
    check_cosine(cosine)
    require_whole(layer, "merge")
    m, origin = len(layer), layer.origin
    A, Amult, B = (getattr(layer, name).blocks.dense() for name in ("A", "Amult", "B"))
    unit = B.to(accumulator(B.dtype))
    group = torch.unique(origin, return_inverse=True)[1]
    leader = torch.arange(m, device=origin.device)
    loose = origin >= 0
    while bool(loose.any()):
        index = loose.nonzero().squeeze(1)
        newest = torch.full((m,), -1, device=origin.device).scatter_reduce_(
            0, group[index], index, "amax"
        )[group[index]]
        found = (unit[index] * unit[newest]).sum(1)
        joins = (found > cosine) | (newest == index)
        leader[index[joins]] = newest[joins]
        loose[index[joins]] = False
    heads = (leader == torch.arange(m, device=origin.device)).nonzero().squeeze(1)
    member = torch.unique(leader, return_inverse=True)[1]
    total, mean, bound = combine(A.to(unit) * Amult.to(unit)[:, None], unit, member)
    crowd = torch.bincount(member) > 1
    fresh, multiplier = split(total)
    layer.set_rows(
        torch.where(crowd[:, None], fresh.to(A.dtype), A[heads]),
        torch.where(crowd, multiplier.to(Amult.dtype), Amult[heads]),
        torch.where(crowd[:, None], mean.to(B.dtype), B[heads]),
        origin[heads],
    )
    # k'(1) = k(1), so slopes obey the bound of values
    return Report("merge", m, len(layer), bound, bound)


def combine(a: Tensor, B: Tensor, group: Tensor) -> tuple[Tensor, Tensor, float]:
    """One row for each group of rows a = Amult A [m o], B [m r]: (Σ a [g o], direction [g r], bound
    on the change).

    The direction b = Σ ⟨a_m, Σa⟩ B_m / |Σa|² makes the first order of the change, Σ a_m ⊗ (B_m -
    b), as small as it can be; weights are kept positive, since rows that cancel have no meaningful
    mean.
    """
    count = int(group.max()) + 1 if len(group) else 0
    total = a.new_zeros(count, a.shape[1]).index_add_(0, group, a)
    square = total.square().sum(1)
    weight = (a * total[group]).sum(1) / torch.where(square > 0, square, 1)[group]
    weight = weight.clamp(min=1e-6)
    mean = B.new_zeros(count, B.shape[1]).index_add_(0, group, B * weight[:, None])
    mean /= torch.linalg.vector_norm(mean, dim=1, keepdim=True)
    moved = torch.linalg.vector_norm(a.double(), dim=1) * displacement((B * mean[group]).sum(1))
    alone = torch.bincount(group, minlength=count)[group] == 1
    return total, mean, float(moved[~alone].sum()) * math.sqrt(K1)


def split(a: Tensor) -> tuple[Tensor, Tensor]:
    """(A [m o], Amult [m]) of rows a = Amult A: the largest number of A is 1, which any storage
    holds.

    With the Amult of one of the summed rows, which weight decay has made small, A would grow beyond
    float16.
    """
    size = a.abs().amax(1)
    size = torch.where(size > 0, size, 1)
    return a / size[:, None], size


def displacement(cosine: Tensor) -> Tensor:
    """‖k(b, ·) - k(b', ·)‖ of two unit directions with this cosine, in the kernel's function
    space."""
    return (2 * (K1 - relu_k(cosine.double()))).clamp_min(0).sqrt()


def check_cosine(cosine: float) -> None:
    if not -1 <= cosine <= 1:
        raise ValueError(
            f"the cosine above which rows are merged is {cosine}; a number from -1 to 1 was "
            "expected (0.9 to 0.99)"
        )
