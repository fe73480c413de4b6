"""Which layers would gain most from a dendrite, before any is grown.

A dendrite adds w_i a_i to neuron i. With the error δ_in = ∂L/∂y_in, the best such w_i lowers a loss
of unit curvature by half of

    g_i = cov(δ_i, a_i)² / var(a_i),     cov and var as sums over samples and positions n

so g asks how much of the error a new feature could explain. As in GradMax (Evci et al. 2022) and
gromo the gradient chooses, but
not the weights: candidates are drawn, with pre-activations scaled to unit variance and shifted by
N(0, 1) so that σ bends both ways, and
the best of several draws counts. A feature that is linear in the layer's input gains nothing once
the neurons have converged.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .conversion import dendritic_layers
from .layers.initial import fresh_copy, generator_for
from .layers.layer import DendriticLayer
from .observe import observe


@dataclass(frozen=True)
class LayerGain:
    """A layer, the error that a new dendrite could explain there, what it would cost, and whether
    the budget allows for it."""

    name: str
    gain: float
    parameters: int
    chosen: bool


def preview(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    budget: int | None = None,
    draws: int = 4,
    seed: int = 0,
) -> list[LayerGain]:
    """Rank layers by gain for each parameter, best first; choose them in that order while they fit
    the ``budget`` (None: all that gain).

    ``loss(model, batch)``: the loss of a batch, summed or averaged over its samples. Nothing in the
    model changes.
    """
    layers = dict(dendritic_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no dendritic layers; call dendritic(model, config) first"
        )
    watchers = {name: _Watcher(name, layer, draws, seed) for name, layer in layers.items()}
    observe(model, layers, watchers, lambda net: (loss(net, batch) for batch in batches))
    return _choose(
        [LayerGain(name, w.gain(), _cost(layers[name]), False) for name, w in watchers.items()],
        budget,
    )


class _Watcher:
    """Sits in a layer's forward pass: lets the error be read off, and tries candidates on the same
    input."""

    def __init__(self, name: str, layer: DendriticLayer, draws: int, seed: int):
        generator = generator_for(seed, name, -1, 0)
        self.bodies = [fresh_copy(layer.neuron, generator, 1.0, False).eval() for _ in range(draws)]
        self.shifts = generator_for(seed, name, -1, 1)
        self.offsets: Tensor | None = None
        self.layer, self.seen, self.sums = layer, [], None

    def __call__(self, y: Tensor, args: tuple, kwargs: dict) -> Tensor:
        axis, features = self.layer.axis, []
        if self.offsets is None:
            shape = (len(self.bodies), y.shape[axis])
            self.offsets = torch.randn(shape, generator=self.shifts, dtype=torch.float64).to(
                y.device
            )
        with torch.no_grad():
            for body, offset in zip(self.bodies, self.offsets):
                z = body(*args, **kwargs)
                z = (
                    z
                    if self.layer.processor_class is None
                    else self.layer.processor_class().post_d(z)
                )
                rows = z.movedim(axis, -1).reshape(-1, z.shape[axis]).double()
                standard = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp_min(1e-12)
                features.append(self.layer.config.activate(standard + offset))
        probe = torch.zeros_like(y, requires_grad=True)
        self.seen.append((probe, torch.stack(features)))  # [draws N n]
        return y + probe

    def take(self, a: Tensor, error: Tensor) -> None:
        e = error.movedim(self.layer.axis, -1).reshape(-1, a.shape[-1]).double()
        new = [
            torch.tensor(float(len(e)), dtype=torch.float64),
            a.sum(1),
            e.sum(0),
            (a * e).sum(1),
            (a * a).sum(1),
        ]
        self.sums = new if self.sums is None else [s + n for s, n in zip(self.sums, new)]

    def gain(self) -> float:
        if self.sums is None:
            return 0.0
        count, a, e, ae, aa = self.sums
        covariance, variance = ae - a * e / count, aa - a * a / count
        return (covariance.square() / variance.clamp_min(1e-12)).sum(-1).max().item()


def _cost(layer: DendriticLayer) -> int:
    own = sum(p.numel() for p in layer.neuron.parameters())
    return own + (layer.neurons or 0) * (1 + len(layer.dendrites))


def _choose(gains: list[LayerGain], budget: int | None) -> list[LayerGain]:
    ranked = sorted(gains, key=lambda g: g.gain / max(g.parameters, 1), reverse=True)
    result, left = [], float("inf") if budget is None else budget
    for gain in ranked:
        fits = gain.gain > 0 and gain.parameters <= left
        left -= gain.parameters if fits else 0
        result.append(replace(gain, chosen=fits))
    return result
