"""Gaussian pair expectations of an activation: what an infinitely wide layer computes with.

For u, v ~ N(0, 1) with correlation c:  k(c) = E[φ(u) φ(v)]  and  k'(c) = E[φ'(u) φ'(v)].
Source: Cho & Saul 2009 (arc-cosine kernels); Yang, Santacroce & Hu 2022, section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TWO_PI = 2 * math.pi


def relu_k(c: Tensor) -> Tensor:
    """k(c) = (sqrt(1 - c²) + c acos(-c)) / 2π of ReLU, for cosines `c` of any shape; rounding
    beyond ±1 is clamped."""
    c = c.clamp(-1, 1)
    return ((1 - c * c).sqrt() + c * (-c).acos()) / TWO_PI


def relu_k_prime(c: Tensor) -> Tensor:
    """k'(c) = acos(-c) / 2π of ReLU."""
    return (-c.clamp(-1, 1)).acos() / TWO_PI


def relu_k_parts(
    c: Tensor, angle: Tensor | None = None, root: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(acos(-c), sqrt(1 - c²)) for `c` already clamped: k and k' times 2π are made of these two,
    each computed once.

    They are written into `angle` and `root` where these are given.
    """
    root = torch.addcmul(c.new_ones(()), c, c, value=-1, out=root).clamp_min_(0).sqrt_()
    return torch.neg(c, out=angle).acos_(), root


def relu_k_taped(c: Tensor) -> tuple[Tensor, Tensor]:
    """(k, k') of ReLU for autograd. At c = ±1, where acos has no derivative, that of k is k' still,
    and that of k' counts as zero: the kernel of a sample with itself stays as it is."""
    inside = 1 - c * c > torch.finfo(c.dtype).eps
    safe = torch.where(inside, c, 0)
    angle = torch.where(inside, (-safe).acos(), math.pi * (c > 0))
    root = torch.where(inside, (1 - safe * safe).sqrt(), 0)
    return (root + torch.where(inside, c, c.clamp(-1, 1)) * angle) / TWO_PI, angle / TWO_PI
