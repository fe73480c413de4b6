"""The same convolution as rows, b·h·w more of them with every step: for tiny inputs. What the
moments are checked against.

    y_δ(q) = s(q) Σ_m Amult_m A_{m,δ} k(⟨B_m, ĝ(q)⟩)
    g_out(p) = Σ_δ y_δ(p·stride + δ·dilation - padding)
    one SGD step:  Amult ← (1 - lr·wd)·Amult
        append for every sample and q:  A_δ ← s(q) ∂L/∂y_δ(q) ,  B ← ĝ(q) ,  Amult ← -lr
    plus bias_alpha · bias where the layer has one, trained by the same SGD

Written from the definition in plain torch, without anything of the moments' own code. Index legend:
b samples, m rows, r rank in, o rank out, k offsets, q input positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pilimit_lib.inf.conv.geometry import check_map, convolve
from pilimit_lib.inf.conv.layers import InfPiConv2d
from pilimit_lib.inf.dual.hermite import Series
from pilimit_lib.inf.dual.relu import relu_k
from pilimit_lib.inf.numerics import direction


class InfPiConv2dRows(nn.Module):
    """An infinitely wide convolution as rows A [m k o], Amult [m], B [m r] (unit rows), with shape
    and bias of the layer `like`.

    `series`: the polynomial kernel to use, default that of `like`; None stands for the exact kernel
    of ReLU. After a backward pass `step` appends the rows that SGD makes.
    """

    def __init__(
        self,
        like: InfPiConv2d,
        A: Tensor,
        Amult: Tensor,
        B: Tensor,
        series: Series | None | str = "like",
    ) -> None:
        super().__init__()
        self.geometry, self.r, self.r_out, self.layernorm = (
            like.geometry,
            like.r,
            like.r_out,
            like.layernorm,
        )
        expected = {
            "A": (len(B), self.geometry.offsets, self.r_out),
            "Amult": (len(B),),
            "B": (len(B), self.r),
        }
        given = {"A": A, "Amult": Amult, "B": B}
        wrong = [
            f"{name} is {list(given[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if given[name].shape != shape
        ]
        if wrong:
            raise ValueError(f"rows that don't fit the layer: {'; '.join(wrong)}")
        self.kernel = (
            (like.series if series == "like" else series).kernel if series is not None else relu_k
        )
        for name, value in given.items():
            self.register_buffer(name, value.clone())
        self.bias_alpha = like.bias_alpha
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach().clone())
        self.probes: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.B)

    def forward(self, g: Tensor) -> Tensor:
        check_map(self, g, self.r, "pre-activations", self.geometry)
        if g.ndim == 3:
            return self(g[None])[0]
        b, _, h, w = g.shape
        unit, s = direction(g.permute(0, 2, 3, 1).reshape(-1, self.r))
        scale = (s > 0).to(s.dtype) if self.layernorm else s
        y = scale * ((self.kernel(unit @ self.B.T) * self.Amult) @ self.A.flatten(1))
        if torch.is_grad_enabled():
            probe = torch.zeros_like(y, requires_grad=True)  # its gradient is ∂L/∂y
            y = y + probe
            self.probes.append((probe, unit.detach(), scale.detach()))
        y = y.view(b, h, w, -1).permute(0, 3, 1, 2)
        if self.geometry.pool != (1, 1):
            y = F.avg_pool2d(y, self.geometry.pool)
        k, o, (kh, kw) = self.geometry.offsets, self.r_out, self.geometry.kernel
        # Picks y_δ at offset δ and nothing else: [o k·o kh kw].
        picks = y.new_zeros(o, k, o, kh, kw)
        for offset in range(k):
            picks[:, offset, :, offset // kw, offset % kw] = torch.eye(o).to(y)
        return convolve(self.geometry, y, picks.flatten(1, 2), self.bias, self.bias_alpha)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0) -> None:
        """One SGD step: append a row for every sample and position of the forward passes since the
        last one."""
        self.Amult.mul_(1 - lr * weight_decay)
        for probe, unit, scale in self.probes:
            if probe.grad is not None:
                self.A = torch.cat([self.A, (scale * probe.grad).view(len(unit), -1, self.r_out)])
                self.B = torch.cat([self.B, unit])
                self.Amult = torch.cat([self.Amult, self.Amult.new_full((len(unit),), -lr)])
        self.probes.clear()
        if self.bias is not None and self.bias.grad is not None:
            self.bias.mul_(1 - lr * weight_decay).add_(self.bias.grad, alpha=-lr)
            self.bias.grad = None
