"""How the layers of a ConvNet follow one another: which maps are added, normalised and disturbed,
and whether sizes and ranks allow that. The same for infinite networks and finite ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from .geometry import check_size


@dataclass(frozen=True)
class Plan:
    """Ranks after the input layer and after each hidden layer; for each hidden layer the window of
    its pooling and its stride; pairs of layers whose outputs are added; for each layer but the
    readout the side of its kernel; the stride of the input layer."""

    ranks: tuple[int, ...]
    pools: tuple[int, ...]
    strides: tuple[int, ...]
    shortcuts: tuple[tuple[int, int], ...]
    kernels: tuple[int, ...]
    input_stride: int = 1

    @classmethod
    def of(
        cls,
        ranks: Sequence[int],
        pools: Sequence[int] | None,
        strides: Sequence[int] | None,
        shortcuts: Sequence[tuple[int, int]],
        kernels: Sequence[int],
        input_stride: int,
    ) -> Plan:
        """The plan that the arguments of a ConvNet describe; raises ValueError where it is none."""
        ones = (1,) * (len(ranks) - 1)
        plan = cls(
            tuple(ranks),
            ones if pools is None else tuple(pools),
            ones if strides is None else tuple(strides),
            tuple((int(i), int(j)) for i, j in shortcuts),
            tuple(kernels),
            input_stride,
        )
        plan.check()
        return plan

    def padding(self, number: int) -> int:
        """Of layer `number`, so that its stride alone makes its map smaller."""
        kernel = self.kernels[number]
        if kernel % 2:
            return kernel // 2
        return (kernel - (self.strides[number - 1] if number else self.input_stride)) // 2

    def check(self) -> None:
        if not self.ranks:
            raise ValueError(
                "ranks is empty; the rank after the input layer, and of each hidden layer, was "
                "expected"
            )
        hidden = len(self.ranks) - 1
        for name, values in (("pools", self.pools), ("strides", self.strides)):
            if len(values) != hidden:
                none = "no pooling" if name == "pools" else "every position"
                raise ValueError(
                    f"{name} has {len(values)} entries for {hidden} hidden layers; give one for "
                    f"each (1: {none})"
                )
        self._check_kernels()
        self._check_shortcuts()

    def _check_kernels(self) -> None:
        if len(self.kernels) != len(self.ranks):
            raise ValueError(
                f"kernels has {len(self.kernels)} entries for {len(self.ranks)} layers before the "
                "readout; give the side of each one's kernel, the input layer's first"
            )
        for kernel, stride in zip(self.kernels, (self.input_stride, *self.strides)):
            whole = isinstance(kernel, int) and not isinstance(kernel, bool) and kernel >= 1
            fits = whole and (kernel % 2 == 1 or (stride % 2 == 0 and kernel >= stride))
            if not fits:
                raise ValueError(
                    f"kernel_size is {kernel!r} with stride {stride}; an odd number was expected, "
                    "or an even one with an even stride that is not larger, so that maps keep "
                    "their size but for strides"
                )

    def _check_shortcuts(self) -> None:
        ranks, ends = self.ranks, [j for _, j in self.shortcuts]
        for i, j in self.shortcuts:
            if not 0 <= i < j < len(ranks):
                raise ValueError(
                    f"the shortcut ({i}, {j}) does not lead from a layer to a later hidden one: "
                    f"layers 0 to {len(ranks) - 1} hand on pre-activations"
                )
            shrinks = (*self.pools[i:j], *self.strides[i:j])
            if ranks[i] != ranks[j] or any(step != 1 for step in shrinks):
                raise ValueError(
                    f"the shortcut ({i}, {j}) adds maps that differ: ranks {ranks[i]} and "
                    f"{ranks[j]}, pooling between them {self.pools[i:j]}, strides "
                    f"{self.strides[i:j]}; a sum needs the same rank and size"
                )
        if len(set(ends)) < len(ends):
            raise ValueError(
                f"two of the shortcuts {self.shortcuts} end in the same layer; the layers they "
                "start from would have to share ω: chain them instead"
            )


class ConvNet(Protocol):
    """What `hidden` and `outputs` need of a network. `norms`: one for each layer but the readout,
    or none at all. `noise`: what is done to the input of each layer after the first, or None."""

    layers: nn.ModuleList
    norms: nn.ModuleList
    noise: nn.Module | None
    shortcuts: tuple[tuple[int, int], ...]
    first_layer_alpha: float
    last_layer_alpha: float


def hidden(net: ConvNet, x: Tensor) -> Tensor:
    """Pre-activations [b c h w] of images `x`, that feed the readout."""
    sources = {j: i for i, j in net.shortcuts}
    kept = {i: None for i in sources.values()}
    g = net.first_layer_alpha * net.layers[0](x)
    for number, layer in enumerate(net.layers[:-1]):
        if number:
            g = layer(_disturbed(net, g))
        if len(net.norms):
            g = net.norms[number](g)
        if number in sources:
            g = g + kept[sources[number]]
        if number in kept:
            kept[number] = g
    return g


def outputs(net: ConvNet, x: Tensor) -> Tensor:
    """The readout's mean over positions, [b classes], of images `x` [b c h w]."""
    if x.ndim != 4:
        raise ValueError(f"images [b, c, h, w] were expected, got {list(x.shape)}")
    size = tuple(x.shape[2:])
    for number, layer in enumerate(net.layers):
        size = check_size(f"layers.{number}: {type(layer).__name__}", layer.geometry, size)
    g = _disturbed(net, hidden(net, x))
    return net.last_layer_alpha * net.layers[-1](g).mean((2, 3))


def _disturbed(net: ConvNet, g: Tensor) -> Tensor:
    return g if net.noise is None else net.noise(g)
