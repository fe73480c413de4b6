"""The native sums of moments: C++ for polynomials of degree 2 at most, without Φ in memory.

Asked for by `implementation(moments="native")`. The semantics are those of `sums`, and so are the
signatures. A step on few samples is what it is for: there the plain sums spend their time in small
operations and in reading what others wrote.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..dual.features import PolynomialFeatures
from ..extension import FLAGS, library

SOURCE = Path(__file__).with_name("native.cpp")
# monomials of one thread: fewer are not worth starting it
A_THREAD = 4096
# samples whose inner products are summed here, and not by BLAS
FEW = 16


_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_SIZES = [_INT] * 4 + [_FLOAT] * 3 + [_LONG]
ARGUMENTS = {
    "pi_moments_forward": [*_SIZES, *[_POINTER] * 3],
    "pi_moments_backward": [*_SIZES, *[_POINTER] * 4],
    "pi_moments_update": [*_SIZES, *[_POINTER] * 3, _FLOAT, _FLOAT],
    "pi_moments_layer": [*_SIZES, *[_POINTER] * 3, _FLOAT, _INT, *[_POINTER] * 4],
    "pi_moments_layer_backward": [*_SIZES, *[_POINTER] * 5, _FLOAT, _INT, *[_POINTER] * 3],
    "pi_moments_norm": [*[_INT] * 3, *[_FLOAT] * 3, *[_POINTER] * 2],
}


@cache
def _library() -> ctypes.CDLL | str:
    found = library(SOURCE, FLAGS)
    if not isinstance(found, str):
        for name, types in ARGUMENTS.items():
            function = getattr(found, name)
            function.argtypes = types
            function.restype = _FLOAT if name == "pi_moments_norm" else None
    return found


def unavailable() -> str | None:
    """Why this machine can't run it, or None; built where that was not done before."""
    found = _library()
    return found if isinstance(found, str) else None


def refuses(features: PolynomialFeatures, u: Tensor, V: Tensor) -> str | None:
    """Why this implementation can't run, or None."""
    if u.device.type != "cpu" or V.device.type != "cpu":
        return f"V lies on {V.device}, directions on {u.device}; it runs on the CPU"
    if u.dtype != torch.float32 or V.dtype != torch.float32:
        return f"V is {V.dtype}, directions {u.dtype}; it sums float32"
    if features.degree > 2:
        return f"the kernel has degree {features.degree}; it knows degrees up to 2"
    if not V.is_contiguous():
        return "V is not contiguous"
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in (u, V)):
        return "torch.func transforms see only torch's own operations"
    if not u.shape[0] or not V.shape[1]:
        return "there is nothing to sum"
    return unavailable()


def forward(features: PolynomialFeatures, u: Tensor, V: Tensor) -> Tensor:
    """Φ(u) V: [b o]."""
    u, out = u.contiguous(), u.new_zeros(u.shape[0], V.shape[1])
    pointers = u.data_ptr(), V.data_ptr(), out.data_ptr()
    _library().pi_moments_forward(*_sizes(features, u, V), *pointers)
    return out


def backward(
    features: PolynomialFeatures, u: Tensor, V: Tensor, grad: Tensor, need_u: bool, need_V: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(∂u [b r], ∂V [P o]) for ∂out `grad` [b o]; None for what is not needed."""
    u, grad = u.contiguous(), grad.contiguous()
    du = dV = None
    if need_V:
        dV = torch.empty_like(V, requires_grad=False)
        update_(features, dV, u, grad, 1.0, 0.0)
    if need_u:
        du = torch.zeros_like(u)
        pointers = u.data_ptr(), V.data_ptr(), grad.data_ptr(), du.data_ptr()
        _library().pi_moments_backward(*_sizes(features, u, V), *pointers)
    return du, dV


def update_(
    features: PolynomialFeatures,
    V: Tensor,
    u: Tensor,
    delta: Tensor,
    scale: float,
    decay: float = 1.0,
) -> None:
    """V ← decay·V + scale·Φ(u)ᵀ delta in place, for u [b r], delta [b o]. Where decay is 0, what V
    held does not matter, NaN neither."""
    u, delta = u.contiguous(), delta.contiguous()
    pointers = u.data_ptr(), V.data_ptr(), delta.data_ptr()
    _library().pi_moments_update(*_sizes(features, u, V), *pointers, scale, decay)
    if not V.is_inference():
        torch.autograd.graph.increment_version(V)  # as torch does where it writes in place


@dataclass(frozen=True)
class Layer:
    """What a layer of moments is besides V: its kernel, and the multiplier of its bias."""

    features: PolynomialFeatures
    layernorm: bool
    alpha: float


class Outputs(NamedTuple):
    """The outputs [b o] of a layer, and what its backward pass needs: directions u [b r], lengths s
    [b 1] and Φ(u) V in `total` [b o]."""

    out: Tensor
    u: Tensor
    s: Tensor
    total: Tensor


def layer(how: Layer, g: Tensor, V: Tensor, bias: Tensor | None) -> Outputs:
    """scale(s) · Φ(u) V + alpha · bias for pre-activations g = s u [b r], see `autograd`."""
    b, o = g.shape[0], V.shape[1]
    g, u, s = g.contiguous(), torch.empty_like(g, requires_grad=False), g.new_empty(b, 1)
    total, out = g.new_zeros(b, o), g.new_empty(b, o)
    given = g.data_ptr(), V.data_ptr(), None if bias is None else bias.data_ptr()
    results = u.data_ptr(), s.data_ptr(), total.data_ptr(), out.data_ptr()
    sizes = _sizes(how.features, g, V)
    _library().pi_moments_layer(*sizes, *given, how.alpha, how.layernorm, *results)
    return Outputs(out, u, s, total)


def layer_backward(
    how: Layer, kept: Outputs, V: Tensor, grad: Tensor, need_g: bool, need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(delta [b o], dg [b r], dbias [o]) for ∂out `grad` [b o]: V's gradient is Φ(u)ᵀ delta."""
    grad = grad.contiguous()
    delta = torch.empty_like(grad)
    dg = torch.zeros_like(kept.u) if need_g else None
    dbias = grad.new_empty(grad.shape[1]) if need_bias else None
    given = (tensor.data_ptr() for tensor in (kept.u, V, kept.s, kept.total, grad))
    results = (None if tensor is None else tensor.data_ptr() for tensor in (delta, dg, dbias))
    sizes = _sizes(how.features, kept.u, V)
    _library().pi_moments_layer_backward(*sizes, *given, how.alpha, how.layernorm, *results)
    return delta, dg, dbias


def factored_norm(features: PolynomialFeatures, u: Tensor, delta: Tensor) -> Tensor | None:
    """Frobenius norm of Φ(u)ᵀ delta from the kernel alone, for few samples; None where torch is
    faster."""
    if len(u) > FEW or u.dtype != torch.float32 or unavailable() is not None:
        return None
    u, delta = u.contiguous(), delta.contiguous()
    sizes = features.r, delta.shape[1], u.shape[0], *features.roots
    return torch.tensor(_library().pi_moments_norm(*sizes, u.data_ptr(), delta.data_ptr()))


def _sizes(features: PolynomialFeatures, u: Tensor, V: Tensor) -> tuple[int | float, ...]:
    """What every function is given first."""
    threads = max(1, min(torch.get_num_threads(), features.P // A_THREAD))
    return threads, features.r, V.shape[1], u.shape[0], *features.roots, features.P
