"""The native sums of moments: C++ for polynomials of degree 2 at most, without Φ in memory.

Asked for by `implementation(moments="native")`. The semantics are those of `sums`, and so are the
signatures. A step on few samples is what it is for: there the plain sums spend their time in small
operations and in reading what others wrote.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..dual.features import PolynomialFeatures
from ..extension import FLAGS, library

SOURCE = Path(__file__).with_name("native.cpp")
# monomials of one thread: fewer are not worth starting it
A_THREAD = 4096


@cache
def _library() -> ctypes.CDLL | str:
    return library(SOURCE, FLAGS)


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
    if not len(u) or not V.shape[1]:
        return "there is nothing to sum"
    return unavailable()


def forward(features: PolynomialFeatures, u: Tensor, V: Tensor) -> Tensor:
    """Φ(u) V: [b o]."""
    u = u.contiguous()
    outs = _run("pi_moments_forward", features, u, V, lambda: u.new_zeros(len(u), V.shape[1]))
    return _total(outs)


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
        du = _total(_run("pi_moments_backward", features, u, V, lambda: torch.zeros_like(u), grad))
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
    scalars = ctypes.c_float(scale), ctypes.c_float(decay)
    _run("pi_moments_update", features, u, V, lambda: None, delta, *scalars)


def _run(
    name: str,
    features: PolynomialFeatures,
    u: Tensor,
    V: Tensor,
    result: Callable[[], Tensor | None],
    *given: Tensor | ctypes.c_float,
) -> list[Tensor | None]:
    """Call a function for all monomials, a stretch of them per thread; the results, in order."""
    function, (b, r), o = getattr(_library(), name), u.shape, V.shape[1]
    kappa = (*features.kappa, 0.0, 0.0)[:3]
    roots = [ctypes.c_float(math.sqrt(value)) for value in kappa]
    threads = max(1, min(torch.get_num_threads(), features.P // A_THREAD))
    edges = [features.P * number // threads for number in range(threads + 1)]

    def stretch(number: int) -> Tensor | None:
        out = result()
        tensors = [u, V, *given, *([] if out is None else [out])]
        function(
            *map(ctypes.c_int, (r, o, b)),
            *roots,
            ctypes.c_long(edges[number]),
            ctypes.c_long(edges[number + 1]),
            *(ctypes.c_void_p(t.data_ptr()) if isinstance(t, Tensor) else t for t in tensors),
        )
        return out

    if threads == 1:
        return [stretch(0)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(stretch, range(threads)))


def _total(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], start=parts[0])
