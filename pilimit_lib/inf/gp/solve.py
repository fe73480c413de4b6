"""Kernel ridge regression: (K + ridge·mean(diag K)·I) C = targets, for several ridges.

Two ways. "cholesky" works inside the matrix it is given: the factor lies in the lower block
triangle, K stays in the upper one and is whole again afterwards, so that the largest problem is the
largest matrix; it costs n³/3 for each ridge. "eigen" costs one eigendecomposition (in time about 40
Cholesky factors, measured at a = 3000 on one thread; in memory four more matrices) for any number
of ridges. That is why "auto" factorises anew for each of a few ridges.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ...core import free_memory
from .panels import Panels

CHOLESKY_PANEL = 512
EIGEN_FROM = 40  # ridges from which one eigendecomposition is cheaper than a factor for each
REFINEMENTS = 12


def resolved(method: str, ridges: int) -> str:
    """The method that "auto" stands for."""
    if method not in ("auto", "cholesky", "eigen"):
        raise ValueError(f"method is {method!r}; choose 'auto', 'cholesky' or 'eigen'")
    if method != "auto":
        return method
    return "eigen" if ridges >= EIGEN_FROM else "cholesky"


def memory_needed(
    samples: int, dtype: torch.dtype = torch.float64, method: str = "auto", ridges: int = 1
) -> int:
    """Bytes for the kernel matrix of `samples` samples and the regression on it (see
    `kernel_ridge`).

    50,000 samples are 10 GB in float32 and 20 GB in float64 with method "cholesky", which works in
    the matrix itself.
    """
    matrix = samples * samples * torch.empty(0, dtype=dtype).element_size()
    if resolved(method, ridges) == "eigen":
        # float64 copy, eigenvectors, and the workspace of the divide-and-conquer driver: two more
        # of the same size.
        return matrix + 4 * samples * samples * 8
    return matrix + 3 * samples * CHOLESKY_PANEL * 8


def require_memory(needed: int, fewer: str = "--train-subset-size") -> None:
    """Raise MemoryError where `needed` bytes are not available now. `fewer`: what takes fewer
    samples."""
    available = free_memory("cpu")
    if available is not None and needed > available:
        raise MemoryError(
            f"the kernel regression needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are "
            f"available. Use fewer samples ({fewer}), float32, or method 'cholesky'"
        )


def kernel_ridge(
    K: Tensor,
    targets: Tensor,
    ridges: Sequence[float],
    *,
    method: str = "auto",
    progress: bool = True,
    keep: str | os.PathLike | None = None,
) -> Tensor:
    """Coefficients C [len(ridges), a, o] in float64 for K [a a] and targets [a o]; each ridge is
    relative to K's mean diagonal.

    A float32 matrix is factorised in float32 and the solution refined against it in float64. Raises
    ValueError where a ridge is too small for the matrix to be positive definite in its precision,
    or for the refinement to converge. K is left as it was.

    `keep` is a folder for the panels of a Cholesky factor while it is made, half as large as K: an
    interrupted factorisation goes on from them, and they are removed once there is a solution.
    """
    _check(K, targets, ridges)
    diagonal = K.diagonal().double()
    absolute = [float(ridge) * float(diagonal.mean()) for ridge in ridges]
    targets = targets.double().to(K.device)
    if resolved(method, len(ridges)) == "eigen":
        values, vectors = torch.linalg.eigh(K.double())
        if min(absolute) + float(values[0]) <= 0:
            raise ValueError(_too_small(ridges[absolute.index(min(absolute))], K.dtype))
        projected = vectors.T @ targets
        return torch.stack(
            [vectors @ (projected / (values + ridge)[:, None]) for ridge in absolute]
        )
    solutions = []
    try:
        for ridge, shift in zip(ridges, absolute):
            try:
                panels = None if keep is None else Panels(keep, K, shift, CHOLESKY_PANEL)
                factor = _Cholesky(K, shift, f"ridge {ridge:g}", progress, panels)
                solutions.append(_refined(K, shift, factor, targets))
                if panels is not None:
                    panels.remove()
            except (torch.linalg.LinAlgError, ArithmeticError) as error:
                raise ValueError(_too_small(ridge, K.dtype)) from error
    finally:
        _mirror(K)
    return torch.stack(solutions)


def _check(K: Tensor, targets: Tensor, ridges: Sequence[float]) -> None:
    if K.ndim != 2 or K.shape[0] != K.shape[1] or K.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"K has shape {list(K.shape)} and type {K.dtype}; expected a square matrix in float32 "
            "or float64"
        )
    if targets.ndim != 2 or len(targets) != len(K):
        raise ValueError(f"targets have shape {list(targets.shape)}; expected [{len(K)}, outputs]")
    if not len(ridges) or not all(0 <= ridge < float("inf") for ridge in ridges):
        raise ValueError(f"ridges are {list(ridges)}; expected at least one, and none negative")


def _too_small(ridge: float, dtype: torch.dtype) -> str:
    return (
        f"ridge {ridge:g} (of the kernel's mean diagonal) is too small for this kernel in {dtype}: "
        "the matrix is not positive definite to its precision. Take a larger ridge"
        + ("" if dtype == torch.float64 else " or float64")
    )


class _Cholesky:
    """L Lᵀ = K + shift·I. Off-diagonal blocks of L lie in the lower block triangle of K, diagonal
    ones here."""

    def __init__(
        self, K: Tensor, shift: float, name: str, progress: bool, panels: Panels | None = None
    ) -> None:
        self.K, self.diagonals = K, []
        count = len(K)
        bar = tqdm(total=count, desc=f"factorising, {name}", disable=not progress)
        with bar:
            for j in range(0, count, CHOLESKY_PANEL):
                end = min(j + CHOLESKY_PANEL, count)
                found = None if panels is None else panels.get(j)
                L, below = self._panel(j, end, shift) if found is None else found
                if panels is not None and found is None:
                    panels.put(j, L, below)
                self.diagonals.append(L)
                K[end:, j:end] = below
                bar.update(end - j)

    def _panel(self, begin: int, end: int, shift: float) -> tuple[Tensor, Tensor]:
        """Columns begin to end of L, from those before: the diagonal block, and what lies below."""
        K = self.K
        panel = K[begin:end, begin:].T.clone()  # the upper triangle is K itself
        panel[: end - begin].diagonal().add_(shift)
        if begin:
            panel.addmm_(K[begin:, :begin], K[begin:end, :begin].T, alpha=-1)
        L = torch.linalg.cholesky(panel[: end - begin].double())
        below = panel[end - begin :]
        return L, torch.linalg.solve_triangular(L.to(K).T, below, upper=True, left=False)

    def solve(self, right: Tensor) -> Tensor:
        """(L Lᵀ)^-1 right [a o], in float64."""
        out, starts = right.clone(), range(0, len(self.K), CHOLESKY_PANEL)
        for j, L in zip(starts, self.diagonals):
            rows = slice(j, j + len(L))
            if j:
                out[rows] -= (self.K[rows, :j] @ out[:j].to(self.K)).double()
            out[rows] = torch.linalg.solve_triangular(L, out[rows], upper=False)
        for j, L in reversed(list(zip(starts, self.diagonals))):
            rows, end = slice(j, j + len(L)), j + len(L)
            if end < len(self.K):
                out[rows] -= (self.K[end:, rows].T @ out[end:].to(self.K)).double()
            out[rows] = torch.linalg.solve_triangular(L.T, out[rows], upper=True)
        return out


def _refined(K: Tensor, shift: float, factor: _Cholesky, targets: Tensor) -> Tensor:
    """The solution to 1e-10 of the targets' size, or ArithmeticError."""
    solution = factor.solve(targets)
    size, before = torch.linalg.vector_norm(targets), float("inf")
    for _ in range(REFINEMENTS):
        residual = targets - _upper_product(K, solution) - shift * solution
        left = float(torch.linalg.vector_norm(residual) / size)
        if left < 1e-10 or not size:
            return solution
        if not left < before:
            break
        before = left
        solution = solution + factor.solve(residual)
    if left < 1e-6:
        return solution
    raise ArithmeticError(f"residual {left:.1e}")


def _upper_product(K: Tensor, right: Tensor) -> Tensor:
    """K right with K taken from its upper block triangle, summed in float64."""
    out = torch.zeros_like(right)
    for j in range(0, len(K), CHOLESKY_PANEL):
        band = K[j : j + CHOLESKY_PANEL, j:].double()
        out[j : j + CHOLESKY_PANEL] += band @ right[j:]
        out[j + CHOLESKY_PANEL :] += band[:, CHOLESKY_PANEL:].T @ right[j : j + CHOLESKY_PANEL]
    return out


def _mirror(K: Tensor) -> None:
    """The lower block triangle from the upper one."""
    for j in range(0, len(K), CHOLESKY_PANEL):
        K[j + CHOLESKY_PANEL :, j : j + CHOLESKY_PANEL] = K[
            j : j + CHOLESKY_PANEL, j + CHOLESKY_PANEL :
        ].T
