"""The π-network written naively in float64, straight from the formulas: dense matrices, gradients
by autograd, lists of rows.

Index legend: b batch, m rows, r rank in, o rank out. Nothing here is shared with the library:
angles instead of cosines, one list of rows for the function and another one for its velocity,
clipping norms from the full matrix of expectations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def relu_expectation(c: Tensor) -> Tensor:
    """E[φ(u) φ(v)] of ReLU for unit Gaussians with correlation c = cos θ: (sin θ + (π − θ) cos θ) /
    2π."""
    # At ±1, where rounding may lead, acos has no derivative, and the kernel is max(c, 0) / 2.
    inside = c.abs() < 1
    angle = torch.acos(torch.where(inside, c, 0))
    found = (torch.sin(angle) + (math.pi - angle) * torch.cos(angle)) / (2 * math.pi)
    return torch.where(inside, found, c.clamp(min=0) / 2)


def monte_carlo(
    f: Callable[[Tensor], Tensor], c: float, draws: int = 1 << 21, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard error) of f(u) f(v) over Gaussians with correlation c."""
    u, w = torch.randn(2, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    products = f(u) * f(c * u + math.sqrt(1 - c * c) * w)
    return float(products.mean()), float(products.std() / math.sqrt(draws))


@dataclass
class Rows:
    """A function g ↦ Σ_m coefficient_m A_m k(⟨B_m, ĝ⟩) as its rows: A [m o], coefficient [m], B [m
    r]."""

    A: Tensor
    coefficient: Tensor
    B: Tensor

    def __add__(self, other: Rows) -> Rows:
        return Rows(
            torch.cat([self.A, other.A]),
            torch.cat([self.coefficient, other.coefficient]),
            torch.cat([self.B, other.B]),
        )

    def __rmul__(self, factor: float) -> Rows:
        return Rows(self.A, factor * self.coefficient, self.B)

    def __call__(self, g: Tensor, layernorm: bool = False) -> Tensor:
        s = g.norm(dim=1, keepdim=True)
        k = relu_expectation((g / s) @ self.B.T)
        out = torch.einsum("bm,m,mo->bo", k, self.coefficient, self.A)
        return out if layernorm else s * out

    def norm(self) -> Tensor:
        """|ΔW| with |ΔW|² = Σ_o A_oᵀ V A_o, V_ij = k(B_i·B_j)."""
        A = self.coefficient[:, None] * self.A
        V = relu_expectation(self.B @ self.B.T)
        return sum(A[:, o] @ V @ A[:, o] for o in range(A.shape[1])).sqrt()


@dataclass(frozen=True)
class Training:
    """Settings of one step of SGD."""

    lr: float = 0.3
    wd: float = 0
    first_mult: float = 1
    last_mult: float = 1
    bias_mult: float = 1
    apply_mult_to_wd: bool = True
    clip: float = 0
    per_param: bool = False
    momentum: float = 0
    dampening: float = 0
    nesterov: bool = False


class NaiveNet:
    """Takes over the parameters of an InfMLP and from then on is trained by the formulas."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.first_alpha, self.last_alpha, self.layernorm = (
            net.first_layer_alpha,
            net.last_layer_alpha,
            net.layernorm,
        )
        self.bias_alphas = [net.bias_alpha] * (net.L + 1) + [net.last_bias_alpha]
        self.A = net.layers[0].A.detach().double().clone()
        self.biases = [
            layer.bias.detach().double().clone() if alpha else None
            for layer, alpha in zip(net.layers, self.bias_alphas)
        ]
        self.rows = [
            Rows(*(getattr(layer, name).detach().double().clone() for name in ("A", "Amult", "B")))
            for layer in net.layers[1:]
        ]
        self.velocity: dict = {}
        self.clear()

    def clear(self) -> None:
        self.grads: dict = {}

    def forward(self, x: Tensor, tape: list[Tensor] | None = None) -> Tensor:
        """Outputs [b o]; `tape` receives the pre-activations that each layer hands on."""
        g = self.first_alpha * self._noted(self._biased(0, x.double() @ self.A), tape)
        for number, rows in enumerate(self.rows, start=1):
            g = self._noted(self._biased(number, rows(g, self.layernorm)), tape)
        return self.last_alpha * g

    def _biased(self, number: int, g: Tensor) -> Tensor:
        return (
            g if self.biases[number] is None else g + self.bias_alphas[number] * self.biases[number]
        )

    def _noted(self, g: Tensor, tape: list[Tensor] | None) -> Tensor:
        if tape is not None:
            tape.append(g if g.requires_grad else g.requires_grad_())
        return g

    def backward(self, x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Add the gradients of the loss of this batch; returns the loss."""
        tape: list[Tensor] = []
        loss = loss_of(self.forward(x, tape))
        deltas = torch.autograd.grad(loss, tape)
        self._add("A", x.double().T @ deltas[0])
        for number, (delta, alpha) in enumerate(zip(deltas, self.bias_alphas)):
            if self.biases[number] is not None:
                self._add(("bias", number), alpha * delta.sum(0))
        for number, delta in enumerate(deltas[1:], start=1):
            g = tape[number - 1].detach() * (self.first_alpha if number == 1 else 1)
            s = g.norm(dim=1, keepdim=True)
            self._add(
                number,
                Rows(
                    delta if self.layernorm else s * delta, torch.ones(len(g), dtype=g.dtype), g / s
                ),
            )
        return loss.detach()

    def _add(self, key, gradient) -> None:
        self.grads[key] = self.grads[key] + gradient if key in self.grads else gradient

    def clip(self, bound: float, per_param: bool) -> Tensor:
        norms = {key: gradient.norm() for key, gradient in self.grads.items()}
        total = sum(norm**2 for norm in norms.values()).sqrt()
        for key, norm in norms.items():
            factor = min(1.0, bound / (float(norm if per_param else total) + 1e-6))
            self.grads[key] = factor * self.grads[key]
        return total

    def step(self, how: Training) -> None:
        if how.clip:
            self.clip(how.clip, how.per_param)
        for key, gradient in self.grads.items():
            kind = (
                key
                if key == "A"
                else "bias"
                if isinstance(key, tuple)
                else "last"
                if key == len(self.rows)
                else "hidden"
            )
            mult = {"A": how.first_mult, "bias": how.bias_mult, "last": how.last_mult, "hidden": 1}[
                kind
            ]
            wd = how.wd if how.apply_mult_to_wd else how.wd / mult
            parameter = (
                self.A
                if key == "A"
                else self.biases[key[1]]
                if kind == "bias"
                else self.rows[key - 1]
            )
            if wd:
                gradient = gradient + wd * parameter
            if how.momentum:
                old = self.velocity.get(key)
                self.velocity[key] = (
                    gradient if old is None else how.momentum * old + (1 - how.dampening) * gradient
                )
                gradient = (
                    gradient + how.momentum * self.velocity[key]
                    if how.nesterov
                    else self.velocity[key]
                )
            new = parameter + (-how.lr * mult) * gradient
            if key == "A":
                self.A = new
            elif kind == "bias":
                self.biases[key[1]] = new
            else:
                self.rows[key - 1] = new
        self.clear()
