"""Multilayer perceptrons of infinite width, and the finite ones sampled from them."""
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .convert import build, load
from .functional import direction
from .layers import ROWS, FinPiLinearReLU, InfPiInputLinearReLU, InfPiLinearReLU, bias_misfit


class InfMLP(nn.Module):
    """An infinitely wide multilayer perceptron that learns features: x [b d_in] to y [b d_out].

        g = first_layer_alpha · input(x) ;  g ← layer(g), L times ;  y = last_layer_alpha · readout(g)

    `layers` holds the input layer, `L` hidden π-layers and the readout, so there are L + 1 stages of ReLU units. (The paper's own
    code counts those stages: its depth is L + 1.)

    Args:
        d_in, d_out: sizes of data and output; r: rank of the pre-activations; L: number of hidden π-layers.
        bias_alpha, last_bias_alpha: multiplier of every bias, and of the readout's (default: the same). 0 means no bias.
        layernorm: each π-layer sees only the direction of its input.
        dtype: of the input layer and biases; row_dtype: of the rows, see `InfPiLinearReLU`.
    """

    def __init__(self, d_in: int, d_out: int, r: int, L: int, first_layer_alpha: float = 1, last_layer_alpha: float = 1,
                 bias_alpha: float | None = 1, last_bias_alpha: float | None = None, layernorm: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                 row_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if L < 0:
            raise ValueError(f"L counts the hidden π-layers and can't be {L}")
        self.d_in, self.d_out, self.r, self.L, self.layernorm = d_in, d_out, r, L, layernorm
        self.first_layer_alpha, self.last_layer_alpha = float(first_layer_alpha), float(last_layer_alpha)
        self.bias_alpha = float(bias_alpha or 0)
        self.last_bias_alpha = self.bias_alpha if last_bias_alpha is None else float(last_bias_alpha)
        self.kernel_output: Tensor | None = None
        common = {"layernorm": layernorm, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList([InfPiInputLinearReLU(d_in, r, bias_alpha, **common)])
        for _ in range(L):
            self.layers.append(InfPiLinearReLU(r, r, bias_alpha, row_dtype=row_dtype, **common))
        self.layers.append(InfPiLinearReLU(r, d_out, self.last_bias_alpha, output_layer=True, row_dtype=row_dtype, **common))

    def forward(self, x: Tensor, save_kernel_output: bool = False) -> Tensor:
        """Outputs [b d_out]. `save_kernel_output` keeps `embedding(x)` in `self.kernel_output`."""
        g = _hidden(self, x)
        if save_kernel_output:
            self.kernel_output = direction(g)[0]
        return self.last_layer_alpha * self.layers[-1](g)

    def embedding(self, x: Tensor) -> Tensor:
        """Directions ĝ [b r] of the pre-activations that feed the readout: what the feature kernel is made of."""
        return direction(_hidden(self, x))[0]

    @property
    def rows(self) -> list[int]:
        """Number of rows in each π-layer."""
        return [len(layer) for layer in self.layers[1:]]

    @property
    def row_bytes(self) -> int:
        """Memory of all rows in bytes."""
        return sum(layer.row_bytes for layer in self.layers[1:])

    def sample(self, n: int) -> FinPiMLPSample:
        """A finite network of width `n` that computes the same function as n → ∞."""
        return FinPiMLPSample(self, n)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], layernorm: bool | None = None,
                        device: torch.device | str | None = None) -> InfMLP:
        """Build the network that `state` came from and load it.

        Our checkpoints know their architecture. Those of the original library don't know whether they use layer norm: say so.
        """
        net = cls(**_architecture(state, layernorm), device=device)
        net.load_state_dict(state)
        return net

    @classmethod
    def from_pilimit_orig(cls, source: str | os.PathLike | Mapping[str, Any], device: torch.device | str | None = None,
                          dtype: torch.dtype | None = None, row_dtype: torch.dtype | None = None) -> InfMLP:
        """Build the network of a checkpoint of the paper's code: a pickled network, a pickled or a converted dictionary.

        Nothing in the file is executed. Its L hidden layers are L - 1 here; rows keep their precision unless told otherwise.
        """
        return build(cls, source, device, dtype, row_dtype)

    def load_pilimit_orig_net(self, orig_net: str | os.PathLike | Mapping[str, Any]) -> None:
        """Take over weights, alphas and layer norm of such a checkpoint, or raise ValueError and stay as before."""
        load(self, orig_net)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load a checkpoint with any number of rows, or raise and stay as before."""
        problems = _misfits(self, state_dict, strict)
        if problems:
            raise RuntimeError("the checkpoint does not fit this InfMLP (InfMLP.from_state_dict builds one that fits):\n  "
                               + "\n  ".join(problems))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def architecture(self) -> dict[str, Any]:
        """The constructor arguments that make a network of this shape."""
        return {name: getattr(self, name) for name in _ARCHITECTURE}

    def get_extra_state(self) -> dict[str, Any]:
        return self.architecture()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name in (*_ALPHAS, "layernorm"):
            setattr(self, name, state[name])
        for layer in self.layers:
            layer.layernorm = self.layernorm

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list,
                              errors: list) -> None:
        """Checkpoints of the original library hold the multipliers as tensors and nothing else about the architecture."""
        for name in _ALPHAS:
            if prefix + name in state:
                setattr(self, name, float(state.pop(prefix + name)))
        absent = prefix + "_extra_state" not in state
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if absent and prefix + "_extra_state" in missing:
            missing.remove(prefix + "_extra_state")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.architecture().items())


class FinPiMLPSample(nn.Module):
    """A network of width `n` sampled from `infnet`, whose training follows the infinite one at distance of order n^-½.

    Needs infnet's own optimiser settings: `param_groups` and `PiSGD` treat both kinds alike.
    """

    def __init__(self, infnet: InfMLP, n: int) -> None:
        super().__init__()
        self.n, self.r, self.L, self.d_in, self.d_out = n, infnet.r, infnet.L, infnet.d_in, infnet.d_out
        self.first_layer_alpha, self.last_layer_alpha = infnet.first_layer_alpha, infnet.last_layer_alpha
        self.bias_alpha, self.last_bias_alpha = infnet.bias_alpha, infnet.last_bias_alpha
        self.layernorm = infnet.layernorm
        self.kernel_output: Tensor | None = None
        self.layers = nn.ModuleList([infnet.layers[0].sample(infnet.d_in, n)])
        for layer in infnet.layers[1:]:
            self.layers.append(layer.sample(n, n, prev_omega=self.layers[-1].omega))

    def forward(self, x: Tensor, save_kernel_output: bool = False) -> Tensor:
        """Outputs [b d_out]. `save_kernel_output` keeps `embedding(x)` in `self.kernel_output`."""
        h = _hidden(self, x)
        if save_kernel_output:
            self.kernel_output = direction(h)[0]
        return self.last_layer_alpha * self.layers[-1](h)

    def embedding(self, x: Tensor) -> Tensor:
        """Directions [b n] of the pre-activations that feed the readout."""
        return direction(_hidden(self, x))[0]

    @torch.no_grad()
    def gaussian_init_(self) -> FinPiMLPSample:
        """Make this the μ-net: independent Gaussian weights, gradients not projected.

        Weights keep the norm of a pre-activation from layer to layer as n → ∞: variance r/(n d) in the input layer (columns of A
        have norm 1) and 2/n in hidden ones; the readout stays as sampled and biases become 0.
        """
        for layer in self.layers[:-1]:
            layer.project = False
            hidden = isinstance(layer, FinPiLinearReLU)
            variance = 2 / layer.n_in if hidden else self.r / (self.n * self.d_in)
            layer.weight.normal_(std=variance ** .5)
            if layer.bias is not None:
                layer.bias.zero_()
        return self

    def extra_repr(self) -> str:
        return f"n={self.n}, r={self.r}, L={self.L}, layernorm={self.layernorm}"


_ALPHAS = ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")
_ARCHITECTURE = ("d_in", "d_out", "r", "L", *_ALPHAS, "layernorm")


def _hidden(net: InfMLP | FinPiMLPSample, x: Tensor) -> Tensor:
    """Pre-activations that feed the readout: [b r], or [b n] of a finite network."""
    g = net.first_layer_alpha * net.layers[0](x)
    for layer in net.layers[1:-1]:
        g = layer(g)
    return g


def _architecture(state: Mapping[str, Any], layernorm: bool | None) -> dict[str, Any]:
    if "_extra_state" in state:
        found = dict(state["_extra_state"])
        if layernorm not in (None, found["layernorm"]):
            raise ValueError(f"the checkpoint says layernorm={found['layernorm']}, the call says {layernorm}")
        return found
    numbers = [int(key.split(".")[1]) for key in state if key.startswith("layers.") and key.endswith(".A")]
    if not numbers or "layers.0.A" not in state or not set(_ALPHAS) <= set(state):
        raise ValueError(f"not a checkpoint of an InfMLP: found {sorted(map(str, state))[:8]}")
    if layernorm is None:
        raise ValueError("a checkpoint of the original library does not say whether the network uses layer norm; "
                         "pass layernorm=True or layernorm=False")
    d_in, r = state["layers.0.A"].shape
    alphas = {name: float(state[name]) for name in _ALPHAS}
    if "layers.0.bias" not in state:
        alphas["bias_alpha"] = 0.0
    return {"d_in": d_in, "d_out": state[f"layers.{max(numbers)}.A"].shape[1], "r": r, "L": max(numbers) - 1,
            "layernorm": layernorm, **alphas}


def _misfits(net: InfMLP, state: Mapping[str, Any], strict: bool) -> list[str]:
    """What in `state` can't be loaded into `net`, apart from the number of rows. Torch would find out halfway through."""
    problems = []
    own = {f"layers.{i}.{name}": parameter for i, layer in enumerate(net.layers) for name, parameter in layer.named_parameters()}
    for key, parameter in own.items():
        if key not in state:
            problems += [f"{key} is missing"] * strict
            continue
        rows = key.rsplit(".", 1)[1] in ROWS and not key.startswith("layers.0.")
        got, expected = list(state[key].shape), list(parameter.shape)
        if len(got) != len(expected) or got[rows:] != expected[rows:]:
            problems.append(f"{key} has shape {got}; expected {['rows', *expected[1:]] if rows else expected}")
    known = {*own, *_ALPHAS, "_extra_state"}
    for i, layer in enumerate(net.layers):
        known |= {f"layers.{i}.{name}" for name in ("bias", "bias_alpha", *(("origin", "layer_alpha") if i else ()))}
        counts = {name: len(state[key]) for name in (*ROWS, "origin") if i and (key := f"layers.{i}.{name}") in state}
        if len(set(counts.values())) > 1:
            problems.append(f"layers.{i} has rows of different number: {counts}")
        misfit = bias_misfit(layer, state, f"layers.{i}.")
        problems += [misfit] if misfit else []
    unknown = sorted(set(state) - known)
    if unknown and strict:
        problems.append(f"unknown entries: {unknown[:8]}")
    if not {*_ALPHAS, "layernorm"} <= set(state.get("_extra_state", {*_ALPHAS, "layernorm"})):
        problems.append(f"_extra_state lacks settings of an InfMLP: {state['_extra_state']}")
    layers = {key.split(".")[1] for key in state if key.startswith("layers.")}
    if len(layers) != len(net.layers) and strict:
        problems.append(f"the checkpoint has {len(layers)} layers, the network {len(net.layers)} (L={net.L})")
    return problems
