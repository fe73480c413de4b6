"""ConvNets of infinite width in constant memory, and the finite ones sampled from them.

    g = first_layer_alpha · input(x) ;  g ← layer(g) [+ an earlier g] ;  y = last_layer_alpha · mean
    over positions of readout(g)

A residual sum of pre-activations is one of g's, if both summands are made of the same neurons ω: in
a finite network the two layers share Ω. The mean of the readout over positions is global average
pooling of *activations*, in which the readout is linear.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints.architecture import KEY, built, decoded, dtype_of
from .checkpoints.network import SavedNetwork
from .conv.layers import InfPiConv2d, InfPiInputConv2d
from .conv.noise import FiniteWidthNoise
from .conv.normalisation import ScalarNorm, check_norm
from .conv.plan import Plan, hidden, outputs
from .finite.projection import projection_misfits, projections, set_projections
from .summary import summary


class InfPiConvNet(SavedNetwork):
    """An infinitely wide ConvNet: images [b channels h w] to outputs [b classes].

    `layers` holds the input layer, `len(ranks) - 1` hidden π-layers and the readout.

    Args:
        channels, classes: of data and output.
        ranks: of the pre-activations after the input layer and after each hidden layer.
        pools: for each hidden layer the window over which activations are averaged before it;
        default no pooling. strides: of each hidden layer, default 1.
        shortcuts: pairs (i, j) of layers: the output of layer i is added to that of layer j > i;
        ranks and sizes must agree.
        kernel_size: of all layers but the readout, odd; maps keep their size but for pooling and
        strides. kernels: of each of them instead, the input layer's first; even ones with even
        strides. input_stride: of the input layer. padding_mode: of all, as in `nn.Conv2d`.
        first_layer_alpha, last_layer_alpha, bias_alpha: multipliers of the input layer, the output
        and all biases (0: none).
        activation, degree, fit, layernorm, start_degree, chunk_elements: see `InfPiConv2d`. gain,
            branch_gain: of a layer's outputs at the start, the latter where a shortcut is added to
            them.
        norm: "scalar" divides each layer's outputs, but the readout's, by their root mean square
            length, see `ScalarNorm`; `gain` and `branch_gain` are then its scale at the start.
        noise_width: of the finite network whose noise disturbs training, see `FiniteWidthNoise`;
            None: no noise.
        dtype: of the input layer and biases; V_dtype: of moments.
    """

    taken = ("first_layer_alpha", "last_layer_alpha", "bias_alpha")
    must_say = True

    def __init__(
        self,
        channels: int,
        classes: int,
        ranks: Sequence[int] = (16, 16, 16, 16),
        *,
        pools: Sequence[int] | None = None,
        shortcuts: Sequence[tuple[int, int]] = (),
        kernel_size: int = 3,
        input_stride: int = 1,
        first_layer_alpha: float = 1,
        last_layer_alpha: float = 1,
        bias_alpha: float | None = 0,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        degree: int = 2,
        fit: str = "minimax",
        layernorm: bool = False,
        gain: float = 1.0,
        branch_gain: float = 0.0,
        chunk_elements: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        V_dtype: torch.dtype | None = None,
        strides: Sequence[int] | None = None,
        kernels: Sequence[int] | None = None,
        padding_mode: str = "zeros",
        start_degree: int | None = None,
        norm: str | None = None,
        noise_width: int | None = None,
    ) -> None:
        super().__init__()
        check_norm(norm)
        sides = (kernel_size,) * len(ranks) if kernels is None else kernels
        plan = Plan.of(ranks, pools, strides, shortcuts, sides, input_stride)
        ranks = plan.ranks
        self.channels, self.classes = channels, classes
        self.ranks, self.pools, self.shortcuts = ranks, plan.pools, plan.shortcuts
        self.kernel_size, self.input_stride = kernel_size, input_stride
        # None where that says the same, for the checkpoints of both to fit
        self.strides = None if set(plan.strides) <= {1} else plan.strides
        self.kernels = None if set(plan.kernels) == {kernel_size} else plan.kernels
        self.padding_mode, self.start_degree = padding_mode, start_degree
        self.norm, self.noise_width = norm, noise_width
        self.first_layer_alpha = float(first_layer_alpha)
        self.last_layer_alpha = float(last_layer_alpha)
        self.bias_alpha, self.layernorm = float(bias_alpha or 0), layernorm
        self.activation = activation if isinstance(activation, str) else "custom"
        self.degree, self.fit = degree, fit
        self.gain, self.branch_gain = float(gain), float(branch_gain)
        self.chunk_elements = chunk_elements
        common = {"bias_alpha": bias_alpha, "device": device, "dtype": dtype}
        first = InfPiInputConv2d(
            channels,
            ranks[0],
            plan.kernels[0],
            input_stride,
            plan.padding(0),
            padding_mode=padding_mode,
            **common,
        )
        self.layers = nn.ModuleList([first])
        common |= {
            "activation": activation,
            "degree": degree,
            "fit": fit,
            "layernorm": layernorm,
            "V_dtype": V_dtype,
            "chunk_elements": chunk_elements,
        }
        ends = {j for _, j in shortcuts}
        gains = [branch_gain if number in ends else gain for number in range(len(ranks))]
        for number, (r, r_out) in enumerate(zip(ranks, (*ranks[1:], classes)), 1):
            how = _READOUT
            if number < len(ranks):
                how = {
                    "gain": 1.0 if norm else gains[number],
                    "kernel_size": plan.kernels[number],
                    "stride": plan.strides[number - 1],
                    "padding": plan.padding(number),
                    "padding_mode": padding_mode,
                    "pool": plan.pools[number - 1],
                    "start_degree": start_degree,
                }
            try:
                self.layers.append(InfPiConv2d(r, r_out, **common, **how))
            except MemoryError as error:
                raise MemoryError(f"layers.{number}: {error}") from None
        scales = [1.0, *gains[1:]] if norm else []
        self.norms = nn.ModuleList(ScalarNorm(s, device=device, dtype=dtype) for s in scales)
        self.noise = None if noise_width is None else FiniteWidthNoise(noise_width)

    def forward(self, x: Tensor) -> Tensor:
        return outputs(self, x)

    def embedding(self, x: Tensor) -> Tensor:
        """Pre-activations [b r h w] that feed the readout."""
        return hidden(self, x)

    @property
    def row_bytes(self) -> int:
        """Memory of all moments in bytes: the same after any number of steps."""
        return sum(layer.row_bytes for layer in self.layers[1:])

    def sample(self, n: int) -> FinPiConvNetSample:
        """A finite network of `n` channels that computes the same function as n → ∞, and trains as
        this one does under SGD. It has the noise of its own width and no other."""
        return FinPiConvNetSample(self, n)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], device: torch.device | str | None = None
    ) -> InfPiConvNet:
        """Build the network that `state` came from and load it."""
        if KEY not in state:
            raise ValueError(
                "the checkpoint holds no architecture of an InfPiConvNet; build the network, then "
                "load_state_dict"
            )
        net = built(
            cls,
            decoded(state[KEY]),
            device=device,
            dtype=dtype_of(state, "layers.0.weight"),
            V_dtype=dtype_of(state, "layers.1.V"),
        )
        net.load_state_dict(state)
        return net

    def differences(self, settings: Mapping[str, Any]) -> Iterator[str]:
        return _differences(self.architecture(), settings)

    def architecture(self) -> dict[str, Any]:
        """The constructor arguments that make a network of this shape. What was added later is
        left out where it is as it was before."""
        names = inspect.signature(InfPiConvNet.__init__).parameters
        found = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return {
            name: value
            for name, value in found.items()
            if name not in _LATER or value != _LATER[name]
        }

    def __repr__(self) -> str:
        return summary(self, self.architecture())


def InfPiResNet(
    channels: int,
    classes: int,
    ranks: Sequence[int] = (16, 16, 16),
    *,
    blocks: int | Sequence[int] = 1,
    block_layers: int = 2,
    pool: int = 2,
    **how: Any,
) -> InfPiConvNet:
    """An `InfPiConvNet` with residual sums: stages of constant rank, in each `blocks` blocks g ← g
    + branch(g).

    A branch has `block_layers` π-layers. Between stages a π-layer averages activations over `pool`
    windows and changes the rank. `how`: further arguments of `InfPiConvNet`.
    """
    counts = (blocks,) * len(ranks) if isinstance(blocks, int) else tuple(blocks)
    if not ranks:
        raise ValueError("ranks is empty; the rank of each stage was expected")
    if len(counts) != len(ranks) or min(counts, default=0) < 0 or block_layers < 1:
        raise ValueError(
            f"blocks is {blocks} for {len(ranks)} stages and block_layers {block_layers}; a count "
            "of blocks for "
            "each stage and at least 1 layer were expected"
        )
    flat, pools, shortcuts = [ranks[0]], [], []
    for stage, (r, count) in enumerate(zip(ranks, counts)):
        if stage:
            flat.append(r)
            pools.append(pool)
        for _ in range(count):
            start = len(flat) - 1
            flat += [r] * block_layers
            pools += [1] * block_layers
            shortcuts.append((start, start + block_layers))
    return InfPiConvNet(channels, classes, flat, pools=pools, shortcuts=shortcuts, **how)


class FinPiConvNetSample(SavedNetwork):
    """A ConvNet of `n` channels sampled from `infnet`; trained by SGD it follows the infinite one
    at distance of order n^-½."""

    taken = ("first_layer_alpha", "last_layer_alpha")

    def __init__(self, infnet: InfPiConvNet, n: int) -> None:
        super().__init__()
        self.n, self.shortcuts = n, infnet.shortcuts
        self.first_layer_alpha = infnet.first_layer_alpha
        self.last_layer_alpha = infnet.last_layer_alpha
        self._infinite = infnet.architecture()
        sources = {j: i for i, j in infnet.shortcuts}
        self.layers = nn.ModuleList()
        for number, layer in enumerate(infnet.layers):
            below = self.layers[-1].omega if number else None
            shared = self.layers[sources[number]].omega if number in sources else None
            self.layers.append(
                layer.sample(n, n, below, shared) if number else layer.sample(infnet.channels, n)
            )
        self.norms, self.noise = copy.deepcopy(infnet.norms), None

    def forward(self, x: Tensor) -> Tensor:
        return outputs(self, x)

    def embedding(self, x: Tensor) -> Tensor:
        """Pre-activations [b n h w] that feed the readout."""
        return hidden(self, x)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], device: torch.device | str | None = None
    ) -> FinPiConvNetSample:
        """Build the network that `state` came from and load it."""
        settings = decoded(state[KEY]) if KEY in state else {}
        infinite, n = settings.get("infinite"), settings.get("n")
        if not isinstance(infinite, Mapping) or type(n) is not int or n < 1:
            raise ValueError(
                "the checkpoint holds no architecture of a FinPiConvNetSample; sample a network of "
                "the same shape, then load_state_dict"
            )
        dtype = dtype_of(state, "layers.0.weight")
        net = cls(built(InfPiConvNet, infinite, device=device, dtype=dtype), n)
        net.load_state_dict(state)
        return net

    def architecture(self) -> dict[str, Any]:
        """The width, the multipliers, the infinite network's architecture, and which layers project
        their gradients."""
        return {
            "n": self.n,
            **{name: getattr(self, name) for name in self.taken},
            "infinite": self._infinite,
            "project": projections(self),
        }

    def differences(self, settings: Mapping[str, Any]) -> Iterator[str]:
        infinite = settings.get("infinite")
        if not isinstance(infinite, Mapping):
            yield f"{KEY} does not say which infinite network this one was sampled from"
            return
        yield from _differences(self._infinite, infinite)
        yield from projection_misfits(self, settings)

    def set_extra_state(self, state: Any) -> None:
        super().set_extra_state(state)
        set_projections(self, decoded(state))

    def __repr__(self) -> str:
        return summary(self, {"n": self.n, "shortcuts": self.shortcuts})


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    mine, theirs = _LATER | dict(mine), _LATER | dict(theirs)
    for name, value in mine.items():
        if name not in _TUNABLE and name in theirs and theirs[name] != value:
            yield f"{name} is {theirs[name]!r} in the checkpoint and {value!r} here"


_READOUT = {"kernel_size": 1, "output_layer": True}
# Arguments that earlier versions did not have, and what their networks were like.
_LATER = {
    "strides": None,
    "kernels": None,
    "padding_mode": "zeros",
    "start_degree": None,
    "norm": None,
    "noise_width": None,
}
# What doesn't matter for whether a checkpoint fits.
_TUNABLE = (
    "first_layer_alpha",
    "last_layer_alpha",
    "bias_alpha",
    "gain",
    "branch_gain",
    "chunk_elements",
    "start_degree",
    "noise_width",
)
