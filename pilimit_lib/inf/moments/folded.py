"""Old rows of a layer folded into moments, so that its memory is bounded.

Folding keeps the part of the kernel k up to degree D and errs by a · |k - k_D| · s for a row of
coefficient a (|Amult A|).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dual.features import PolynomialFeatures
from ..dual.hermite import Series, hermite_series
from ..dual.relu import relu_k_prime
from ..entries import parameter_misfits, refused
from ..numerics import accumulator
from .finite_weight import finite_moments
from .sums import update_


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

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        """A checkpoint without folded rows has none; one with some has all that belongs to them,
        made with the same kernel."""
        if not any(prefix + name in state for name, _ in self.named_buffers()):
            return
        found = list(parameter_misfits(self, state, prefix, strict=True))
        if not found and not torch.allclose(
            state[prefix + "kappa"].cpu().double(), self.kappa.cpu().double(), rtol=1e-6, atol=1e-9
        ):
            found.append(
                f"{prefix}V: rows were folded with kernel coefficients "
                f"{state[prefix + 'kappa'].tolist()}, here they are {self.kappa.tolist()}; use the "
                "same degree and fit"
            )
        yield from found

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if refused(self, state, prefix, errors):
            return
        for name, value in self.named_buffers():
            state.setdefault(
                prefix + name, self.kappa if name == "kappa" else torch.zeros_like(value)
            )
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
