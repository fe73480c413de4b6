"""Empirical neural tangent kernels: how a step on one sample moves the output for another.

    Θ(x, x') = Σ_θ J_θ(x) J_θ(x')ᵀ          J_θ = ∂f/∂θ [o p], over all parameters that train

A step on a layer of rows appends a row instead of moving parameters, so its part is one of
functions: with δ = ∂f/∂out [o r_out] at the output of the layer,

    Θ_l(x, x') = s s' k(⟨ĝ, ĝ'⟩) δ(x) δ(x')ᵀ

which is what J_V J_Vᵀ is of moments. So f(x) moves by -lr Θ(x, x') ∂L/∂f(x') in the first order of
lr, for every kind of network. Weights of finite π-networks count with their projected gradients,
as in training. Index legend: a, b samples, o outputs, c calls and positions of a layer, p numbers
of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ..numerics import direction, output_scale
from ..rows.layer import RowLayer
from ..rows.parameter import ROWS
from ..rows.pending import relu_kernel
from .features import evaluating

JACOBIAN_BYTES = 256 << 20  # of one chunk of samples, where `chunk` is not given
Jacobians = dict[str, Tensor]


def empirical_ntk(
    net: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    outputs: str = "mean",
    by_layer: bool = False,
    chunk: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """The tangent kernel Θ(x1, x2) of `net` in evaluation mode, float64 on the CPU; `x2` defaults
    to `x1`.

    Args:
        x1 [a ...], x2 [b ...]: samples. The output for each must be one tensor, of o numbers, that
            does not depend on other samples.
        outputs: "mean" is the mean of Θ's diagonal over outputs, [a b]; "full" is [a b o o].
        by_layer: the part of each parameter (and of each layer of rows) by its name; their sum is
            Θ.
        chunk: samples whose Jacobians are in memory together; default by `JACOBIAN_BYTES`. Every
            pair of chunks is computed anew.
    """
    if outputs not in ("mean", "full"):
        raise ValueError(f"outputs is {outputs!r}; 'mean' or 'full' was expected")
    tangents = _Tangents(net)
    with evaluating(net):
        chunk = chunk or tangents.samples_within(JACOBIAN_BYTES, x1)
        combine = _mean if outputs == "mean" else _full
        others = (x1 if x2 is None else x2).split(chunk)
        blocks: list[dict[str, Tensor]] = []
        for number, one in enumerate(x1.split(chunk)):
            left = tangents.jacobians(one)
            row = []
            for place, other in enumerate(others):
                twice = x2 is None and place == number
                right = left if twice else tangents.jacobians(other)
                row.append(tangents.product(left, right, combine))
            blocks.append({name: torch.cat([part[name] for part in row], 1) for name in row[0]})
    found = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return found if by_layer else sum(found.values())


def _full(one: Tensor, other: Tensor) -> Tensor:
    """Θ [a b o o] of Jacobians [a o p] and [b o p]."""
    return torch.einsum("aop,bqp->aboq", one, other)


def _mean(one: Tensor, other: Tensor) -> Tensor:
    return one.flatten(1) @ other.flatten(1).T / one.shape[1]


class _Tangents:
    """Derivatives of the outputs of a network by its parameters and, of layers of rows, by their
    outputs."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.rows = {n: m for n, m in net.named_modules() if isinstance(m, RowLayer)}
        kept_as_rows = {f"{n}.{part}" if n else part for n in self.rows for part in ROWS}
        self.parameters = {
            name: parameter.detach()
            for name, parameter in net.named_parameters()
            if parameter.requires_grad and name not in kept_as_rows
        }
        self.rows = {n: m for n, m in self.rows.items() if m.A.requires_grad}
        if not self.parameters and not self.rows:
            raise ValueError(f"{type(net).__name__} has no parameter that trains (requires_grad)")

    def samples_within(self, budget: int, x: Tensor) -> int:
        """How many samples of `x` have Jacobians of at most so many bytes; at least one."""
        with torch.no_grad():
            out = self.net(x[:1])
        each = 8 * sum(parameter.numel() for parameter in self.parameters.values())
        return max(1, budget // max(1, each * out.numel()))

    def jacobians(self, x: Tensor) -> tuple[Jacobians, Jacobians, Jacobians]:
        """By parameters [a o p]; and of the layers of rows by their outputs [a o c r_out], and what
        they received [a c r]."""
        probes = self._probes(x[:1])

        def outputs(parameters: Jacobians, probes: Jacobians, sample: Tensor) -> Any:
            out, received = self._run(parameters, probes, sample[None])
            return out.reshape(-1), received

        each = vmap(jacrev(outputs, argnums=(0, 1), has_aux=True), in_dims=(None, None, 0))
        (by_parameter, by_probe), received = each(self.parameters, probes, x)
        return (
            {name: J.detach().flatten(2).double().cpu() for name, J in by_parameter.items()},
            {name: J.detach().double().cpu() for name, J in by_probe.items()},
            {name: g.detach().double().cpu() for name, g in received.items()},
        )

    def product(
        self,
        one: tuple[Jacobians, ...],
        other: tuple[Jacobians, ...],
        combine: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Θ of each parameter and layer of rows, for two chunks of samples."""
        parts = {name: combine(one[0][name], other[0][name]) for name in one[0]}
        for name, layer in self.rows.items():
            kernel = _row_kernel(layer, one[2][name], other[2][name])
            if kernel.shape[1] == kernel.shape[3] == 1:
                product = combine(one[1][name].flatten(2), other[1][name].flatten(2))
                each = kernel[:, 0, :, 0]
                parts[name] = product * (each if product.ndim == 2 else each[..., None, None])
            else:
                full = torch.einsum("aocr,bqdr,acbd->aboq", one[1][name], other[1][name], kernel)
                diagonal = full.diagonal(dim1=2, dim2=3).mean(-1)
                parts[name] = diagonal if combine is _mean else full
        return parts

    def _run(
        self, parameters: Jacobians, probes: Jacobians, x: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output for one sample, with `probes` [c r_out] added to what layers of rows give, and
        what these received [c r]."""
        received: dict[str, list[Tensor]] = {name: [] for name in self.rows}
        seen = dict.fromkeys(self.rows, 0)

        def hook_of(name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                flat = out.reshape(-1, out.shape[-1])
                received[name].append(args[0].reshape(-1, args[0].shape[-1]))
                if name not in probes:
                    return out
                start = seen[name]
                seen[name] += len(flat)
                return out + probes[name][start : start + len(flat)].reshape(out.shape)

            return hook

        handles = [m.register_forward_hook(hook_of(name)) for name, m in self.rows.items()]
        try:
            out = functional_call(self.net, parameters, (x,))
        finally:
            for handle in handles:
                handle.remove()
        return out, {name: torch.cat(parts) for name, parts in received.items() if parts}

    def _probes(self, x: Tensor) -> dict[str, Tensor]:
        """Zeros [c r_out] for every layer of rows that runs."""
        with torch.no_grad():
            _, received = self._run(self.parameters, {}, x)
        return {name: g.new_zeros(len(g), self.rows[name].r_out) for name, g in received.items()}


def _row_kernel(layer: RowLayer, g: Tensor, h: Tensor) -> Tensor:
    """The inner products [a c b d] of the rows that a step on g [a c r] and h [b d r] would
    append."""
    (a, c, r), (b, d, _) = g.shape, h.shape
    kernel = getattr(layer, "kernel", None)
    if kernel is not None:  # a learner in the space of a fixed kernel
        return kernel(g.reshape(-1, r), h.reshape(-1, r)).double().reshape(a, c, b, d)
    (u, s), (v, t) = direction(g.reshape(-1, r)), direction(h.reshape(-1, r))
    s, t = output_scale(s, layer.layernorm), output_scale(t, layer.layernorm)
    return (s * relu_kernel(u, v) * t.T).reshape(a, c, b, d)
