"""ConvNets of infinite width in constant memory, and the finite ones sampled from them.

    g = first_layer_alpha · input(x) ;  g ← layer(g) [+ an earlier g] ;  y = last_layer_alpha · mean
    over positions of readout(g)

A residual sum of pre-activations is one of g's, if both summands are made of the same neurons ω: in
a finite network the two layers share Ω. The mean of the readout over positions is global average
pooling of *activations*, in which the readout is linear.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints.architecture import KEY, built, decoded, dtype_of
from .checkpoints.network import SavedNetwork
from .conv.geometry import check_size
from .conv.layers import InfPiConv2d, InfPiInputConv2d
from .finite.projection import projection_misfits, projections, set_projections
from .summary import summary


class InfPiConvNet(SavedNetwork):
    """An infinitely wide ConvNet: images [b channels h w] to outputs [b classes].

    `layers` holds the input layer, `len(ranks) - 1` hidden π-layers and the readout.

    Args:
        channels, classes: of data and output.
        ranks: of the pre-activations after the input layer and after each hidden layer.
        pools: for each hidden layer the window over which activations are averaged before it;
        default no pooling.
        shortcuts: pairs (i, j) of layers: the output of layer i is added to that of layer j > i;
        ranks and sizes must agree.
        kernel_size: of all layers but the readout, odd; maps keep their size but for pooling.
        input_stride: of the input layer.
        first_layer_alpha, last_layer_alpha, bias_alpha: multipliers of the input layer, the output
        and all biases (0: none).
        activation, degree, fit, layernorm, chunk_elements: see `InfPiConv2d`. gain, branch_gain: of
            a layer's outputs at the start, the latter where a shortcut is added to them.
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
    ) -> None:
        super().__init__()
        ranks, hidden = tuple(ranks), len(ranks) - 1
        pools = (1,) * hidden if pools is None else tuple(pools)
        shortcuts = tuple((int(i), int(j)) for i, j in shortcuts)
        _check_plan(ranks, pools, shortcuts, kernel_size)
        self.channels, self.classes = channels, classes
        self.ranks, self.pools, self.shortcuts = ranks, pools, shortcuts
        self.kernel_size, self.input_stride = kernel_size, input_stride
        self.first_layer_alpha = float(first_layer_alpha)
        self.last_layer_alpha = float(last_layer_alpha)
        self.bias_alpha, self.layernorm = float(bias_alpha or 0), layernorm
        self.activation = activation if isinstance(activation, str) else "custom"
        self.degree, self.fit = degree, fit
        self.gain, self.branch_gain = float(gain), float(branch_gain)
        self.chunk_elements = chunk_elements
        common = {"bias_alpha": bias_alpha, "device": device, "dtype": dtype}
        padding = kernel_size // 2
        self.layers = nn.ModuleList(
            [InfPiInputConv2d(channels, ranks[0], kernel_size, input_stride, padding, **common)]
        )
        common |= {
            "activation": activation,
            "degree": degree,
            "fit": fit,
            "layernorm": layernorm,
            "V_dtype": V_dtype,
            "chunk_elements": chunk_elements,
        }
        ends = {j for _, j in shortcuts}
        for number, (r, r_out, pool) in enumerate(
            zip(ranks, (*ranks[1:], classes), (*pools, 1)), 1
        ):
            how = {
                "gain": branch_gain if number in ends else gain,
                "kernel_size": kernel_size,
                "padding": padding,
                "pool": pool,
            }
            try:
                self.layers.append(
                    InfPiConv2d(r, r_out, **common, **(how if number < len(ranks) else _READOUT))
                )
            except MemoryError as error:
                raise MemoryError(f"layers.{number}: {error}") from None

    def forward(self, x: Tensor) -> Tensor:
        return _outputs(self, x)

    def embedding(self, x: Tensor) -> Tensor:
        """Pre-activations [b r h w] that feed the readout."""
        return _hidden(self, x)

    @property
    def row_bytes(self) -> int:
        """Memory of all moments in bytes: the same after any number of steps."""
        return sum(layer.row_bytes for layer in self.layers[1:])

    def sample(self, n: int) -> FinPiConvNetSample:
        """A finite network of `n` channels that computes the same function as n → ∞, and trains as
        this one does under SGD."""
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
        """The constructor arguments that make a network of this shape."""
        names = inspect.signature(InfPiConvNet.__init__).parameters
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

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

    def forward(self, x: Tensor) -> Tensor:
        return _outputs(self, x)

    def embedding(self, x: Tensor) -> Tensor:
        """Pre-activations [b n h w] that feed the readout."""
        return _hidden(self, x)

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
    for name, value in mine.items():
        if name not in _TUNABLE and name in theirs and theirs[name] != value:
            yield f"{name} is {theirs[name]!r} in the checkpoint and {value!r} here"


_READOUT = {"kernel_size": 1, "output_layer": True}
# What doesn't matter for whether a checkpoint fits.
_TUNABLE = (
    "first_layer_alpha",
    "last_layer_alpha",
    "bias_alpha",
    "gain",
    "branch_gain",
    "chunk_elements",
)


def _check_plan(
    ranks: tuple[int, ...],
    pools: tuple[int, ...],
    shortcuts: tuple[tuple[int, int], ...],
    kernel_size: int,
) -> None:
    if not ranks:
        raise ValueError(
            "ranks is empty; the rank after the input layer, and of each hidden layer, was expected"
        )
    if len(pools) != len(ranks) - 1:
        raise ValueError(
            f"pools has {len(pools)} entries for {len(ranks) - 1} hidden layers; give one for each "
            "(1: no pooling)"
        )
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size is {kernel_size!r}; an odd number was expected, so that maps keep their "
            "size"
        )
    ends = [j for _, j in shortcuts]
    for i, j in shortcuts:
        if not 0 <= i < j < len(ranks):
            raise ValueError(
                f"the shortcut ({i}, {j}) does not lead from a layer to a later hidden one: layers "
                "0 to "
                f"{len(ranks) - 1} hand on pre-activations"
            )
        if ranks[i] != ranks[j] or any(pool != 1 for pool in pools[i:j]):
            raise ValueError(
                f"the shortcut ({i}, {j}) adds maps that differ: ranks {ranks[i]} and {ranks[j]}, "
                "pooling between "
                f"them {pools[i:j]}; a sum needs the same rank and size"
            )
    if len(set(ends)) < len(ends):
        raise ValueError(
            f"two of the shortcuts {shortcuts} end in the same layer; the layers they start from "
            "would have to "
            "share ω: chain them instead"
        )


def _hidden(net: InfPiConvNet | FinPiConvNetSample, x: Tensor) -> Tensor:
    sources = {j: i for i, j in net.shortcuts}
    kept = {i: None for i in sources.values()}
    g = net.first_layer_alpha * net.layers[0](x)
    for number, layer in enumerate(net.layers[:-1]):
        if number:
            g = layer(g)
            if number in sources:
                g = g + kept[sources[number]]
        if number in kept:
            kept[number] = g
    return g


def _outputs(net: InfPiConvNet | FinPiConvNetSample, x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise ValueError(f"images [b, c, h, w] were expected, got {list(x.shape)}")
    size = tuple(x.shape[2:])
    for number, layer in enumerate(net.layers):
        size = check_size(f"layers.{number}: {type(layer).__name__}", layer.geometry, size)
    return net.last_layer_alpha * net.layers[-1](_hidden(net, x)).mean((2, 3))
