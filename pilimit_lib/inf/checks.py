"""Refusals that several layers share, made before anything is allocated or changed."""

from __future__ import annotations

import sys

import torch

from ..core import free_memory


def refuse_wrapping(message: str) -> None:
    """For the `detach` of a parameter that can't be one of another module: raise where
    `nn.Parameter` asks for it, in which parametrizations wrap a weight.

    It would fail anyway, since detaching gives an ordinary tensor, but without a reason.
    """
    if sys._getframe(2).f_globals.get("__name__") == "torch.nn.parameter":
        raise TypeError(message)


def check_memory(
    P: int,
    r_out: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    r: int,
    degree: int,
    else_do: str = "",
) -> None:
    """Raise MemoryError where V [P o] alone would not fit, before anything is allocated. `else_do`:
    one more remedy."""
    need, free = P * r_out * torch.empty((), dtype=dtype).element_size(), free_memory(device)
    if free is not None and need > free:
        raise MemoryError(
            f"moments of degree {degree} at r={r} are a matrix of P={P:,} x {r_out}: "
            f"{need / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free. Lower the degree or r, or use "
            f"V_dtype=torch.bfloat16{else_do}"
        )
