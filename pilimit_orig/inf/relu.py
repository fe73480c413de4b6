"""Gaussian expectations of a pair of ReLUs, as functions of the cosine of the pair.

For unit x, y with cosine c and w ~ N(0, I): k(c) = E[φ(w·x) φ(w·y)], dk(c) = E[φ'(w·x) φ'(w·y)] =
dk/dc.
Source: Yang, Santacroce & Hu (2022), section 2; Cho & Saul (2009).
"""

import math

import torch


def k(c):
    """E[φ φ] at cosine c: 1/2 at c = 1, 1/2π at 0, 0 at -1."""
    c = c.clamp(-1, 1)
    return ((1 - c * c).sqrt() + c * torch.acos(-c)) / (2 * math.pi)


def dk(c):
    """E[φ' φ'] at cosine c, which is the derivative of k."""
    return torch.acos(-c.clamp(-1, 1)) / (2 * math.pi)


def radial(c):
    """k(c) - c·dk(c): what the length of the argument receives in the backward pass."""
    c = c.clamp(-1, 1)
    return (1 - c * c).sqrt() / (2 * math.pi)


def unit(g):
    """Rows of g [b r] as directions [b r] and lengths [b 1]; a zero row has the direction zero, so
    nothing becomes NaN."""
    s = g.norm(dim=1, keepdim=True)
    return torch.where(s > 0, g / torch.where(s > 0, s, torch.ones_like(s)), torch.zeros_like(g)), s


def rows_norm(A, B):
    """Length of the function that rows A [m o], B [m r] (unit) add to a layer: sqrt(Σ_o A_oᵀ k(BBᵀ)
    A_o)."""
    squared = ((A @ A.T) * k(B @ B.T)).sum()
    return squared.clamp(min=0).sqrt()
