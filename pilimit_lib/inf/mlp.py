"""Multilayer perceptrons of infinite width."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints.architecture import ALPHAS, architecture_of, built
from .checkpoints.entries import number_misfit, refused
from .checkpoints.network import SavedNetwork
from .checkpoints.original import build, load
from .finite.mlp import FinPiMLPSample, hidden, scaled
from .layers import InfPiInputLinearReLU, InfPiLinearReLU
from .moments.layer import InfPiLinear
from .numerics import direction
from .rows.merge import Report
from .summary import summary

__all__ = ["FinPiMLPSample", "InfMLP"]


class InfMLP(SavedNetwork):
    """An infinitely wide multilayer perceptron that learns features: x [b d_in] to y [b d_out].

        g = first_layer_alpha · input(x)
        g ← layer(g), L times
        y = last_layer_alpha · readout(g)

    `layers` holds the input layer, `L` hidden π-layers and the readout, so there are L + 1 stages
    of ReLU units. (The paper's own code counts those stages: its depth is L + 1. Its network on
    CIFAR-10, depth 2 there, is L = 1.)

    Args:
        d_in, d_out: sizes of data and output; r: rank of the pre-activations; L: number of hidden
        π-layers.
        bias_alpha, last_bias_alpha: multiplier of every bias, and of the readout's (default: the
        same). 0 means no bias.
        layernorm: each π-layer sees only the direction of its input.
        dtype: of the input layer and biases; row_dtype: of the rows, see `InfPiLinearReLU`, or of
        the moments.
        memory: "rows" grows with every step and is exact for ReLU; "moments" has constant size, see
        `InfPiLinear`.
        degree, fit: of the moments' kernel, see `hermite_series`; activation: of the moments'
        units.
        row_budget: keep the newest so many rows exact, only older ones as moments (with either
            `memory`); merge: rows of the same sample, see `InfPiLinearReLU`; fused: see
            `InfPiLinear`.
    """

    taken = (*ALPHAS, "layernorm")
    also_loads = ALPHAS  # as the original library's checkpoints hold them

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int,
        L: int,
        first_layer_alpha: float = 1,
        last_layer_alpha: float = 1,
        bias_alpha: float | None = 1,
        last_bias_alpha: float | None = None,
        layernorm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        row_dtype: torch.dtype | None = None,
        memory: str = "rows",
        degree: int = 2,
        fit: str = "hermite",
        activation: str | Callable[[Tensor], Tensor] = "relu",
        row_budget: int | None = None,
        merge: float | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        _check_memory(memory, activation, row_budget, merge, fused)
        if L < 0:
            raise ValueError(f"L counts the hidden π-layers and can't be {L}")
        self.d_in = d_in
        self.d_out = d_out
        self.r = r
        self.L = L
        self.layernorm = layernorm
        self.first_layer_alpha = float(first_layer_alpha)
        self.last_layer_alpha = float(last_layer_alpha)
        self.bias_alpha = float(bias_alpha or 0)
        self.last_bias_alpha = (
            self.bias_alpha if last_bias_alpha is None else float(last_bias_alpha)
        )
        self.memory = memory
        self.degree = degree
        self.fit = fit
        self.row_budget = row_budget
        self.merge_cosine = merge
        self.activation = activation if isinstance(activation, str) else "custom"
        self.fused = fused
        self.kernel_output: Tensor | None = None
        common = {"layernorm": layernorm, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList([InfPiInputLinearReLU(d_in, r, bias_alpha, **common)])
        common |= {"degree": degree, "fit": fit}
        if memory == "moments" and row_budget is None:
            make = InfPiLinear
            common |= {"V_dtype": row_dtype, "activation": activation, "fused": fused}
        else:
            make = InfPiLinearReLU
            common |= {"row_dtype": row_dtype, "row_budget": row_budget, "merge": merge}
        for _ in range(L):
            self.layers.append(make(r, r, bias_alpha=bias_alpha, **common))
        self.layers.append(
            make(r, d_out, bias_alpha=self.last_bias_alpha, output_layer=True, **common)
        )

    def forward(self, x: Tensor, save_kernel_output: bool = False) -> Tensor:
        """Outputs [b d_out]. `save_kernel_output` keeps `embedding(x)` in `self.kernel_output`."""
        g = hidden(self, x)
        if save_kernel_output:
            self.kernel_output = direction(g)[0]
        return scaled(self.last_layer_alpha, self.layers[-1](g))

    def embedding(self, x: Tensor) -> Tensor:
        """Directions ĝ [b r] of the pre-activations that feed the readout: what the feature kernel
        is made of."""
        return direction(hidden(self, x))[0]

    @property
    def rows(self) -> list[int]:
        """Number of rows in each π-layer; of moments, their number P, which never changes."""
        return [
            layer.P if isinstance(layer, InfPiLinear) else len(layer) for layer in self.layers[1:]
        ]

    @property
    def row_bytes(self) -> int:
        """Memory of all rows, or moments, in bytes."""
        return sum(layer.row_bytes for layer in self.layers[1:])

    def sample(self, n: int) -> FinPiMLPSample:
        """A finite network of width `n` that computes the same function as n → ∞."""
        return FinPiMLPSample(self, n)

    def to_moments(
        self, degree: int | None = None, fit: str | None = None, fused: bool = False
    ) -> InfMLP:
        """This network with the rows of every layer as one matrix of fixed size; the original stays
        as it is.

        `degree` and `fit`: default those of rows that were folded already (`row_budget`), else 2
        and "hermite".
        """
        if not self._rows():
            raise ValueError(
                "this network is made of moments already; to_moments turns rows into moments"
            )
        # __init__ would draw and allocate every layer only to throw it away
        moments = type(self).__new__(type(self))
        nn.Module.__init__(moments)
        layers = [layer.to_moments(degree, fit, fused) for layer in self.layers[1:]]
        settings = {
            name: value for name, value in self.__dict__.items() if not name.startswith("_")
        }
        series = layers[0].series
        moments.__dict__.update(
            settings
            | {
                "memory": "moments",
                "degree": series.degree,
                "fit": series.fit,
                "fused": fused,
                "row_budget": None,
                "merge_cosine": None,
                "kernel_output": None,
            }
        )
        moments.layers = nn.ModuleList([copy.deepcopy(self.layers[0]), *layers])
        return moments

    def merge(self, cosine: float = 0.95) -> list[Report]:
        """Sum rows of the same sample whose directions agree, in every layer; see
        `rows.merge`."""
        self._need_rows("merge")
        return [layer.merge(cosine) for layer in self.layers[1:]]

    def compress(self, tol: float) -> list[Report]:
        """Keep as few rows as a relative error `tol` of each layer allows; see
        `rows.compress`."""
        self._need_rows("compress")
        return [layer.compress(tol) for layer in self.layers[1:]]

    def _rows(self) -> bool:
        return isinstance(self.layers[-1], InfPiLinearReLU)

    def _need_rows(self, what: str) -> None:
        if not self._rows():
            raise ValueError(
                f"{what} works on rows; this network is made of moments, whose size never changes"
            )

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        layernorm: bool | None = None,
        device: torch.device | str | None = None,
    ) -> InfMLP:
        """Build the network that `state` came from and load it.

        Our checkpoints know their architecture, and dtypes stay those that they hold. Those of the
        original library don't know whether they use layer norm: say so.
        """
        net = built(cls, architecture_of(state, layernorm), device=device)
        net.load_state_dict(state)
        return net

    @classmethod
    def from_pilimit_orig(
        cls,
        source: str | os.PathLike | Mapping[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        row_dtype: torch.dtype | None = None,
        **how: Any,
    ) -> InfMLP:
        """Build the network of a checkpoint of the paper's code: a pickled network, a pickled or a
        converted dictionary.

        Nothing in the file is executed. Its L hidden layers are L - 1 here; rows keep their
        precision unless told otherwise. `how`: further arguments of the constructor, such as
        memory="moments".
        """
        return build(cls, source, device, dtype, row_dtype, **how)

    def load_pilimit_orig_net(self, orig_net: str | os.PathLike | Mapping[str, Any]) -> None:
        """Take over weights, alphas and layer norm of such a checkpoint, or raise ValueError and
        stay as before."""
        load(self, orig_net)

    def architecture(self) -> dict[str, Any]:
        """The constructor arguments that make a network of this shape."""
        found = {name: getattr(self, name) for name in _ARCHITECTURE}
        return found | {"merge": self.merge_cosine}

    def entry_misfits(self, state: Mapping[str, Any], prefix: str, strict: bool) -> Iterator[str]:
        yield from super().entry_misfits(state, prefix, strict)
        for name in ALPHAS:
            misfit = prefix + name in state and number_misfit(state[prefix + name], prefix + name)
            if misfit:
                yield misfit

    def set_extra_state(self, state: Any) -> None:
        super().set_extra_state(state)
        for layer in self.layers:
            layer.layernorm = self.layernorm

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        """Checkpoints of the original library hold the multipliers as tensors and nothing else
        about the architecture."""
        if refused(self, state, prefix, errors):
            return
        for name in ALPHAS:
            if prefix + name in state:
                setattr(self, name, float(state.pop(prefix + name)))
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def __repr__(self) -> str:
        settings = self.architecture()
        if self.last_bias_alpha == self.bias_alpha:
            settings["last_bias_alpha"] = None
        return summary(self, settings)


_ARCHITECTURE = (
    "d_in",
    "d_out",
    "r",
    "L",
    *ALPHAS,
    "layernorm",
    "memory",
    "degree",
    "fit",
    "activation",
    "row_budget",
    "fused",
)


def _check_memory(
    memory: str, activation: Any, row_budget: int | None, merge: float | None, fused: bool
) -> None:
    if memory not in ("rows", "moments"):
        raise ValueError(f"memory is {memory!r}; 'rows' or 'moments' was expected")
    if memory == "rows" and activation != "relu":
        raise ValueError("rows are exact for ReLU only; use memory='moments' for other activations")
    if fused and (memory == "rows" or row_budget is not None):
        raise ValueError(
            "fused concerns layers that are moments altogether: rows are never formed as a "
            "gradient anyway"
        )
    if row_budget is not None and activation != "relu":
        raise ValueError(
            "row_budget keeps the newest rows exact, which rows are for ReLU only; leave it out"
        )
    if memory == "moments" and row_budget is None and merge is not None:
        raise ValueError(
            "merge sums rows of the same sample, and moments are none; use memory='rows', or a "
            "row_budget"
        )
