"""Σ_δ s(p+δ) Φ(ĝ(p+δ)) V_δ without Φ: a convolution of features that exist for a chunk of positions
at a time.

    forward    y_δ = V_δᵀ Φᵀ for all offsets δ in one matrix product [k·o P] x [P n],
               then shifted sums of the y_δ
    backward   ∂y_δ are shifted copies of ∂out;  ∂V = Φᵀ ∂y ,  ∂Φ = V ∂y ,  ∂g from ∂Φ;
               Φ is made again

Every input position is worked on once, whatever the kernel; a stride splits the map into phases, so
that no product is thrown away. Maps lie as [channels, samples, rows, columns] in memory, so that a
chunk of whole maps is a slice of columns, and are seen from outside as [b r h w]. With `pool`
windows the Φ of a window are averaged before the product.

Index legend: b samples, r rank in, o rank out, h w rows and columns of a map, k offsets of a phase,
n positions, P monomials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dual.features import PolynomialFeatures
from ..implementation import chosen
from ..numerics import direction, output_scale
from .chunks import Chunk, chunks
from .geometry import Geometry, Phase
from .positions import Positions, weights

CHUNK_ELEMENTS = 1 << 19  # 2 MiB of float32: Φ, and the products made of it, stay near the core
# but fewer positions are slower, because operations on short vectors are mostly overhead
POSITIONS = 1024
# 32 MiB of float32: what Φ may take by default however many monomials there are
LARGEST = 1 << 23
# 256 MiB of float32: a GPU wants long products, and calls in thousands would keep it waiting
ON_GPU = 1 << 26


def positions_at_once(P: int, chunk_elements: int | None = None, gpu: bool = False) -> int:
    """How many positions have their Φ in memory together: `chunk_elements` numbers, or one position
    if that is more."""
    if chunk_elements is None:
        chunk_elements = ON_GPU if gpu else min(LARGEST, max(CHUNK_ELEMENTS, POSITIONS * P))
    return max(1, chunk_elements // P)


@torch.no_grad()
def forward(
    features: PolynomialFeatures,
    g: Tensor,
    V: Tensor,
    geometry: Geometry,
    layernorm: bool = False,
    chunk_elements: int | None = None,
) -> Tensor:
    """The convolution of g [r b h w] with V [P kh kw o]: [o b h' w'], in g's dtype (float32 or
    float64)."""
    twin = _twin(features, g, V, geometry)
    if twin is not None:
        return twin.forward(features, g, V, geometry, layernorm)
    out = g.new_zeros(V.shape[3], g.shape[1], *geometry.output(tuple(g.shape[2:])))
    work = _Work(features, g, V, geometry, layernorm, chunk_elements)
    for phase in geometry.phases():
        matrix = work.matrix(phase).T.contiguous()
        for chunk in work.chunks(phase):
            phi, _ = work.phi(chunk)
            chunk.add_shifted(torch.mm(matrix, phi, out=work.buffer("y", len(matrix), chunk)), out)
    return out


@torch.no_grad()
def backward(
    features: PolynomialFeatures,
    g: Tensor,
    V: Tensor,
    geometry: Geometry,
    grad: Tensor,
    need_g: bool,
    need_V: bool,
    layernorm: bool = False,
    chunk_elements: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(∂g [r b h w], ∂V [P kh kw o]) for ∂out `grad` [o b h' w']; None for what is not needed."""
    twin = _twin(features, g, V, geometry) if need_V else None
    if twin is not None:
        dg = (
            backward(features, g, V, geometry, grad, True, False, layernorm, chunk_elements)[0]
            if need_g
            else None
        )
        return dg, twin.gradient(features, g, V, geometry, grad, layernorm).to(V.dtype)
    grad = grad.contiguous()
    dg = torch.zeros_like(g, memory_format=torch.contiguous_format) if need_g else None
    dV = torch.zeros_like(V, dtype=g.dtype, requires_grad=False) if need_V else None
    work = _Work(features, g, V, geometry, layernorm, chunk_elements)
    for phase in geometry.phases():
        matrix = work.matrix(phase)
        total = torch.zeros_like(matrix)
        for chunk in work.chunks(phase):
            phi, parts = work.phi(chunk)
            dy = chunk.shifted(grad, work.buffer("y", matrix.shape[1], chunk))
            if need_V:
                total.addmm_(phi, dy.T)
            if need_g:
                dphi = torch.mm(matrix, dy, out=phi)  # Φ is used up by now
                for part, window in zip(parts, chunk.windows(dg)):
                    window.copy_(part.gradient(dphi).view_as(window))
        if need_V:
            blocks = (total * work.scale[:, None]).view(features.P, len(phase.taps), -1)
            for number, ((i, j), _) in enumerate(phase.taps):
                dV[:, i, j] = blocks[:, number]
    return dg, None if dV is None else dV.to(V.dtype)


def plain(
    features: PolynomialFeatures, g: Tensor, V: Tensor, geometry: Geometry, layernorm: bool = False
) -> Tensor:
    """The same [b r h w] -> [b o h' w'] by the definition: all of Φ at once, then conv2d.
    Differentiable to any order.

    What the rest is tested against.
    """
    b, r, h, w = g.shape
    unit, s = direction(g.permute(0, 2, 3, 1).reshape(-1, r))
    phi = (features.matrix(unit) * output_scale(s, layernorm)).view(b, h, w, -1).permute(0, 3, 1, 2)
    if geometry.pool != (1, 1):
        phi = F.avg_pool2d(phi, geometry.pool)
    return F.conv2d(
        phi,
        V.to(phi.dtype).permute(3, 0, 1, 2),
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
    )


def _twin(
    features: PolynomialFeatures, g: Tensor, V: Tensor, geometry: Geometry
) -> ModuleType | None:
    """The Triton implementation, where `triton_kernels` asks for it and it does not refuse."""
    if chosen().moments != "triton":
        return None
    from . import triton_kernels as conv_triton

    return conv_triton if conv_triton.usable(features, g, V, geometry) else None


class _Work:
    """What one pass over a batch needs: the matrices of each phase, chunks, and memory that they
    take turns in."""

    def __init__(
        self,
        features: PolynomialFeatures,
        g: Tensor,
        V: Tensor,
        geometry: Geometry,
        layernorm: bool,
        chunk_elements: int | None,
    ) -> None:
        self.features, self.geometry, self.layernorm = features, geometry, layernorm
        self.g, self.V = g, V
        self.positions = positions_at_once(features.P, chunk_elements, g.is_cuda)
        self.scale = weights(features, g) / math.prod(geometry.pool)
        self.memory: dict[str, Tensor] = {}

    def matrix(self, phase: Phase) -> Tensor:
        """The part [P k·o] of V that a phase needs, times the factors that Φ is left without.

        A row of Φᵀ times a factor is that row of V times the factor, and V has far fewer columns
        than Φᵀ has positions.
        """
        picked = torch.stack([self.V[:, i, j] for (i, j), _ in phase.taps], 1)
        return picked.flatten(1).to(self.scale.dtype) * self.scale[:, None]

    def chunks(self, phase: Phase) -> Iterator[Chunk]:
        return chunks(
            self.geometry, phase, self.g.shape[1], tuple(self.g.shape[2:]), self.positions
        )

    def phi(self, chunk: Chunk) -> tuple[Tensor, list[Positions]]:
        """(ΣΦᵀ over the pooling window [P n], what it was made of) for the positions of a chunk."""
        phi, parts = self.buffer("phi", self.features.P, chunk), []
        for number, window in enumerate(chunk.windows(self.g)):
            parts.append(Positions(self.features, window.reshape(len(self.g), -1), self.layernorm))
            parts[-1].write(phi, add=number > 0)
        return phi, parts

    def buffer(self, name: str, rows: int, chunk: Chunk) -> Tensor:
        """Memory [rows n] for a chunk, the same each time as long as it suffices."""
        size = rows * chunk.positions
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = self.g.new_empty(size)
        return self.memory[name][:size].view(rows, -1)
