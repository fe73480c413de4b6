"""A start of the input layer that whitens patches: an ordinary linear map, made from training
images.

    C = mean of x xᵀ over patches x ∈ R^d        d = channels · kernel rows · kernel columns
    W = (d_kept)^-½ (Λ + eps·λ₁)^-½ Uᵀ           of the r largest eigenvalues Λ of C, λ₁ ≥ λ₂ ≥ ...

So g = W x has |g|² of mean about 1 and no direction that is larger than another. Where r > d the
remaining ranks start at 0: patches have no further directions.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Geometry

EPS = 1e-3
PATCHES_AT_ONCE = 1 << 18


class InputConv(Protocol):
    """A convolution of images: W [r c kh kw]."""

    geometry: Geometry
    weight: Tensor
    bias: Tensor | None
    bias_alpha: float


@torch.no_grad()
def whiten_(layer: InputConv, images: Tensor, eps: float = EPS) -> Tensor:
    """Start `layer` as a whitening of the patches of `images` [b c h w]; returns their eigenvalues
    [d], largest first.

    Patches lie inside the images, at the layer's own stride and dilation. A layer with a bias also
    takes their mean away, and C is then their covariance.

    Args:
        eps: is added to the eigenvalues, as a share of the largest: directions whose variance is
            below that share, which are mostly noise, are not blown up to the size of the others.
    """
    channels = layer.weight.shape[1]
    if images.ndim != 4 or images.shape[1] != channels or not len(images):
        raise ValueError(
            f"whiten_ expects images [b, {channels}, h, w] as the layer does, got "
            f"{list(images.shape)}; pass some training images"
        )
    moment, mean = patch_moments(images, layer.geometry)
    if layer.bias is not None:
        moment = moment - torch.outer(mean, mean)
    matrix, values = whitening(moment, eps)
    kept = matrix[: len(layer.weight)] / min(len(matrix), len(layer.weight)) ** 0.5
    flat = torch.zeros_like(layer.weight).flatten(1)
    flat[: len(kept)] = kept.to(flat)
    layer.weight.copy_(flat.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(-(flat @ mean.to(flat)) / layer.bias_alpha)
    return values


def whitening(moment: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """((Λ + eps·λ₁)^-½ Uᵀ [d d], Λ [d], largest first) for the second moments [d d] of patches, in
    float64."""
    if not eps > 0:
        raise ValueError(f"eps is {eps}; a positive share of the largest eigenvalue was expected")
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if not bool(values.isfinite().all()) or not values[0] > 0:
        raise ValueError(
            "the patches are all alike, or hold NaN or infinity: they can't be whitened; check the "
            "images"
        )
    # An eigenvector's sign is the solver's whim: its largest entry shall be positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign() / (values + eps * values[0]).sqrt()).T, values


def patch_moments(images: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """(mean of x xᵀ [d d], mean of x [d]) over the patches x of `images` [b c h w], float64."""
    d = images.shape[1] * geometry.offsets
    inside = Geometry(geometry.kernel, geometry.stride, dilation=geometry.dilation)
    rows, columns = inside.output(tuple(images.shape[2:]))
    if min(rows, columns) < 1:
        raise ValueError(
            f"images of {images.shape[2]}x{images.shape[3]} hold no patch of {geometry.kernel}; "
            "use larger images or a smaller kernel"
        )
    total = images.new_zeros(d, d, dtype=torch.float64)
    sums = images.new_zeros(d, dtype=torch.float64)
    for part in images.split(max(1, PATCHES_AT_ONCE // (rows * columns))):
        patches = F.unfold(part, geometry.kernel, geometry.dilation, 0, geometry.stride)
        patches = patches.transpose(0, 1).flatten(1)  # [d, patches]
        total += patches @ patches.T
        sums += patches.sum(1)
    count = len(images) * rows * columns
    return total / count, sums / count
