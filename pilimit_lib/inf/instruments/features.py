"""Feature kernels: the inner products of the activations that each layer receives, for every kind
of network.

    infinite, rows        K(x, x') = s s' k(⟨ĝ, ĝ'⟩)               k of ReLU, exact
    infinite, moments     K(x, x') = s s' k_D(⟨ĝ, ĝ'⟩)             the polynomial of the layer
    finite π- and μ-      K(x, x') = ⟨φ(h), φ(h')⟩                  tends to the above as n → ∞
    other layers          K(x, x') = ⟨h, h'⟩                        h what the layer is called with

Under layer norm s is 1. Of maps (b r h w) and sequences (b t r) K is the mean over positions of the
same place, of layers that are called more than once over the calls. Layers that receive the data
are left out: that kernel does not change. Index legend: a samples, p positions, r rank, n width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..conv.finite import FinPiConv2d
from ..conv.layers import InfPiConv2d, InfPiInputConv2d
from ..dual.relu import relu_k
from ..layers import FinPiInputLinearReLU, FinPiLinearReLU, InfPiInputLinearReLU, InfPiLinearReLU
from ..moments.layer import InfPiLinear
from ..numerics import direction, output_scale

INFINITE = (InfPiLinearReLU, InfPiLinear, InfPiConv2d)
FINITE = (FinPiLinearReLU, FinPiConv2d)
DATA = (InfPiInputLinearReLU, FinPiInputLinearReLU, InfPiInputConv2d)
ORDINARY = (nn.Linear, nn.modules.conv._ConvNd)
POSITIONS_AT_ONCE = 1 << 24  # numbers of cosines in memory


@torch.no_grad()
def feature_kernels(net: nn.Module, x: Tensor, batch_size: int = 256) -> dict[str, Tensor]:
    """The kernel [a a], float64 on the CPU, of what each layer of `net` receives for samples `x`
    [a ...], by the layer's name, in the order in which they run."""
    layers = receiving_layers(net)
    parts: dict[str, list[Tensor]] = {}
    with evaluating(net):
        for batch in x.split(batch_size):
            for name, received in _received(net, layers, batch).items():
                parts.setdefault(name, []).append(received)
    ordinary = [name for name in parts if isinstance(layers[name], ORDINARY)]
    if ordinary and next(iter(parts)) == ordinary[0]:
        del parts[ordinary[0]]  # it runs first: it receives the data
    if not parts:
        raise ValueError(
            f"{type(net).__name__} has no layer that receives features: π-layers, finite ones, "
            "nn.Linear or convolutions behind a first one were expected"
        )
    return {name: _kernel(layers[name], torch.cat(found)) for name, found in parts.items()}


def receiving_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers with weights that `net` consists of, without those that only data can enter."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, (*INFINITE, *FINITE, *ORDINARY))
        and not (isinstance(module, FinPiConv2d) and module.nonlin is None)
    }


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Inside the `with` every module of `net` is in evaluation mode; afterwards as before."""
    before = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _received(net: nn.Module, layers: dict[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """What each layer is called with for samples `x` [b ...]: [b p r], on the CPU, in order of
    execution."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, []).append(_by_position(module, args[0]).cpu())

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(calls, 1) for name, calls in found.items()}


def _by_position(module: nn.Module, h: Tensor) -> Tensor:
    """[b p r] of a map [b r h w], or of [b ... r]."""
    if isinstance(module, (InfPiConv2d, FinPiConv2d)):
        return h.flatten(2).mT
    if isinstance(module, nn.modules.conv._ConvNd):
        return h.flatten(2).mT
    return h.reshape(len(h), -1, h.shape[-1])


def _kernel(layer: nn.Module, h: Tensor) -> Tensor:
    """K [a a] of `layer` for what it receives, h [a p r]."""
    h = h.double().transpose(0, 1)  # [p a r]
    places = max(1, POSITIONS_AT_ONCE // h.shape[1] ** 2)
    return sum(_of_positions(layer, part).sum(0) for part in h.split(places)) / len(h)


def _of_positions(layer: nn.Module, h: Tensor) -> Tensor:
    """[p a a] for h [p a r]."""
    if isinstance(layer, FINITE):
        if layer.layernorm:
            h = direction(h)[0]
        h = layer.nonlin(h)
        return h @ h.mT
    if isinstance(layer, INFINITE):
        unit, s = direction(h)
        scale = output_scale(s, layer.layernorm)
        cosine = unit @ unit.mT
        kernel = (
            relu_k(cosine) if isinstance(layer, InfPiLinearReLU) else layer.series.kernel(cosine)
        )
        return scale * kernel * scale.mT
    return h @ h.mT
