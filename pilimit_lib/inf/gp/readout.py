"""The readout of an infinitely wide network as a Bayesian linear model: an output is linear in V.

    y = last_layer_alpha · (s Φ(ĝ) V + bias_alpha · bias) = ⟨ψ(x), (V, bias)⟩

so that posterior, predictive variance and marginal likelihood over the readout are closed form,
given the features that the layers below have learned. Index legend as in `linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..finite.mlp import hidden
from ..moments.layer import InfPiLinear
from ..numerics import direction, output_scale
from .linear import LinearPosterior, linear_posterior


def readout_features(net: nn.Module, x: Tensor) -> Tensor:
    """ψ(x) [b P], or [b P+1] with a bias: what the outputs of `net`, an InfMLP of moments, are
    linear in."""
    readout = _readout(net)
    unit, s = direction(hidden(net, x))
    psi = output_scale(s, readout.layernorm) * readout.features.matrix(unit)
    if readout.bias is not None:
        psi = torch.cat([psi, psi.new_full((len(psi), 1), readout.bias_alpha)], 1)
    return net.last_layer_alpha * psi


@torch.no_grad()
def readout_posterior(
    net: nn.Module, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], **how: Any
) -> LinearPosterior:
    """The posterior of (V, bias) of the readout given samples (x [b d], y [b o]); `how`: see
    `linear_posterior`."""
    readout = _readout(net)
    features = lambda: ((readout_features(net, x), y) for x, y in batches())  # noqa: E731
    return linear_posterior(features, readout.P + (readout.bias is not None), **how)


@torch.no_grad()
def set_readout(net: nn.Module, posterior: LinearPosterior) -> None:
    """Let the readout of `net` be the posterior's mean: its outputs are then those of the Gaussian
    process."""
    readout, mean = _readout(net), posterior.mean
    expected = [readout.P + (readout.bias is not None), readout.r_out]
    if list(mean.shape) != expected:
        raise ValueError(
            f"a posterior of weights {list(mean.shape)}; this readout has {expected}: it must come "
            "from the same network"
        )
    readout.V.copy_(mean[: readout.P])
    if readout.bias is not None:
        readout.bias.copy_(mean[-1])


def _readout(net: nn.Module) -> InfPiLinear:
    readout = net.layers[-1]
    if not isinstance(readout, InfPiLinear):
        raise TypeError(
            f"the readout is a {type(readout).__name__}; a posterior needs moments: "
            "net.to_moments(), or memory='moments'"
        )
    return readout
