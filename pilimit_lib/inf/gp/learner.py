"""Learners without features: a function in the space of a fixed kernel, such as NNGP or NTK, that
trains as π-layers do.

    f(x) = Σ_m Amult_m A_m K(B_m, x)          A [m o], Amult [m], B [m d]: samples seen

SGD on f appends one row per sample, with `PiSGD`. Index legend: b batch, m rows, d data, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...core import UNKNOWN
from ..numerics import transformed
from ..rows.autograd import refuse_ddp, refuse_second_order, untrainable
from ..rows.layer import RowLayer
from ..rows.pending import Rows
from ..summary import summary

Kernel = Callable[[Tensor, Tensor], Tensor]


class KernelReadout(RowLayer):
    """The only layer of a `KernelMLP`: samples x [b d] to outputs [b o]. It begins without rows, as
    the zero function."""

    def __init__(
        self,
        d: int,
        o: int,
        kernel: Kernel,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d, o, dtype, device)
        self.d = d
        self.kernel = kernel
        self.bias = None

    @property
    def row_kernel(self) -> Kernel:
        return self.kernel

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d:
            raise ValueError(f"KernelReadout expects samples [..., {self.d}], got {list(x.shape)}")
        if transformed():
            out = self.output(x)
            return out + untrainable(self, self.A) if self.A.requires_grad else out
        if torch.is_grad_enabled() and self.A.requires_grad:
            refuse_ddp(self)
            return _KernelFunction.apply(x, self.A, self)
        with torch.no_grad():
            return self.output(x)

    def output(self, x: Tensor) -> Tensor:
        """f(x) [b o], summed block by block."""
        out = x.new_zeros(len(x), self.r_out)
        for A, Amult, B in self.row_blocks():
            out = out + self.kernel(x, B).to(out) @ (Amult[:, None] * A)
        return out


class _KernelFunction(torch.autograd.Function):
    """f on the tape, where A keeps it; samples are data, and get no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, layer: KernelReadout) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.output(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        refuse_second_order(layer)
        unknown = torch.full((len(x),), UNKNOWN, device=x.device)
        return None, layer.deliver(Rows(grad, x, unknown, layer.kernel)), None


class KernelMLP(nn.Module):
    """A learner in the space of `kernel` (`gp.ReLUKernel`: NNGP or NTK) with the interface of the
    π-networks."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel: Kernel,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_in = d_in
        self.d_out = d_out
        self.kernel = kernel
        self.first_layer_alpha = self.last_layer_alpha = 1.0
        self.layers = nn.ModuleList([KernelReadout(d_in, d_out, kernel, device, dtype)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)

    def __repr__(self) -> str:
        return summary(self, {"d_in": self.d_in, "d_out": self.d_out, "kernel": self.kernel})

    @property
    def rows(self) -> list[int]:
        """Number of rows."""
        return [len(self.layers[0])]

    @property
    def row_bytes(self) -> int:
        """Memory of the rows in bytes."""
        return self.layers[0].row_bytes
