"""Numbers that every layer needs: the precision of sums, length, direction and scale."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# the compiler of torch before 2.6 can't trace the question whether a transform is active
_TRACEABLE = hasattr(torch.compiler, "set_stance")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The precision in which rows of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, surrounds the caller:
    `requires_grad` then does not tell what will be differentiated."""
    if torch.compiler.is_compiling() and not _TRACEABLE:
        return False
    functorch = torch._C._are_functorch_transforms_active()
    return functorch or torch.autograd.forward_ad._current_level >= 0


def full_precision(like: Tensor) -> AbstractContextManager:
    """Inside the `with`, autocast leaves operations alone. (The meta device knows no autocast.)"""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def length(g: Tensor) -> Tensor:
    """s [b 1], the length of each pre-activation; where it is 0 all its derivatives are 0."""
    with torch.no_grad():
        s = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    if not (torch.is_grad_enabled() and (g.requires_grad or transformed())):
        return s
    # torch's second derivative of a norm at 0 is NaN: take it elsewhere, and mask the result.
    return torch.linalg.vector_norm(g + (s == 0), dim=-1, keepdim=True) * (s != 0)


def direction(g: Tensor) -> tuple[Tensor, Tensor]:
    """(ĝ [b r], s [b 1]): unit vector and length of each pre-activation; zero vectors have
    direction zero."""
    s = length(g)
    return g / torch.where(s > 0, s, 1), s


def output_scale(s: Tensor, layernorm: bool) -> Tensor:
    """What a sum over directions is multiplied with, for lengths s: s itself; under layer norm 1,
    but 0 where s is 0."""
    return (s > 0).to(s.dtype) if layernorm else s
