"""Do finite networks scale as their limit does? Activations and updates against width, and the
layer that is off.

What a layer does by itself is told apart from what reaches it: its *gain* is the size of its output
over that of its input before training, and its *own update* the change of its output on the inputs
it had then, after the first step that changes it. A wrong initialisation shows in the gain of its
layer, a wrong learning rate in the own update of its layer, and in no other.

Sizes are root mean squares over samples of the norm |h| of an output, which tends to |g| of the
infinite layer as n → ∞. Index legend: b samples, n width. Source: Yang et al. 2022 (Tensor Programs
V), appendix D.1; there widths are compared with each other, here with their limit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .features import DATA, FINITE, INFINITE, ORDINARY

INFINITY = math.inf
ROUNDING = 64  # roundings of an output that are no update
QUANTITIES = ("activation", "change", "gain", "own update")


@dataclass(frozen=True)
class Measured:
    """Sizes of one layer of one network at one step: of its output, of the output's change since
    the start; and, once each, its gain and its own update (NaN elsewhere)."""

    width: float
    seed: int
    step: int
    layer: str
    activation: float
    change: float
    gain: float
    own_update: float


@dataclass(frozen=True)
class Finding:
    """A layer whose `what` ("gain" or "own update") does not tend to its limit: it goes as
    n^`exponent`, and at the largest width is `ratio` times the limit (NaN where none was given)."""

    layer: str
    what: str
    exponent: float
    ratio: float

    def __str__(self) -> str:
        cause = "initialisation" if self.what == "gain" else "learning rate"
        against = "" if math.isnan(self.ratio) else f", {self.ratio:.3g} times the limit"
        return (
            f"{self.layer}: its {self.what} goes as n^{self.exponent:.2f}{against} "
            f"(look at its {cause})"
        )


@dataclass(frozen=True)
class CoordCheck:
    """What was measured, and what is off. A frame: `pandas.DataFrame(check.measured)`."""

    measured: tuple[Measured, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def off(self) -> list[str]:
        """The layers that are off, in order."""
        return list(dict.fromkeys(found.layer for found in self.findings))

    def __str__(self) -> str:
        widths = sorted({m.width for m in self.measured})
        if self.ok:
            return f"every layer scales as it should, widths {widths[0]:g} to {widths[-1]:g}"
        return "\n".join(map(str, self.findings))


def coord_check(
    make: Callable[[int], nn.Module],
    widths: Sequence[int],
    x: Tensor,
    y: Tensor,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    limit: nn.Module | None = None,
    steps: int = 4,
    seeds: Iterable[int] = (0, 1, 2),
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    exponent: float = 0.3,
    tolerance: float = 0.3,
) -> CoordCheck:
    """Train networks of each width for a few steps on the one batch `x` [b ...], `y`, beside their
    limit.

    Args:
        make: a fresh network of width n; called after torch's generator was seeded. optimizer: that
            of a network.
        limit: the infinite network that `make` samples from; its layers have the same names. A
            copy of it is trained too. Without one widths are compared with each other only.
        exponent, tolerance: a layer is off where a size goes as n to a larger power than that, or
            where at the largest width it differs from the limit by a larger factor than
            1 + tolerance; means over `seeds`.

    Own updates are judged where all gains are right, on which they depend. Where a readout starts
    at zero, the layers below it are first changed by the second step, in proportion to what the
    first made of the readout; what is wrong with the readout is taken out of their own updates.
    """
    widths, seeds = sorted(set(widths)), list(seeds)
    if len(widths) < 2 or widths[0] < 1 or not seeds or steps < 2:
        raise ValueError(
            f"widths {widths}, seeds {seeds}, {steps} steps: two positive widths, one seed and two "
            "steps were expected at least"
        )
    measured = []
    for width in widths:
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                net = make(width)
            measured += _run(net, optimizer(net), width, seed, x, y, steps, loss)
    if limit is not None:
        net = copy.deepcopy(limit)
        measured += _run(net, optimizer(net), INFINITY, 0, x, y, steps, loss)
    return CoordCheck(tuple(measured), tuple(_findings(measured, exponent, tolerance)))


def weight_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The layers with weights of `net`, by name."""
    kinds = (*INFINITE, *FINITE, *DATA, *ORDINARY)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


def _run(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    width: float,
    seed: int,
    x: Tensor,
    y: Tensor,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> list[Measured]:
    layers = weight_layers(net)
    first = _seen(net, layers, x)
    gains = {
        name: size(out) / size(inside) if size(inside) else math.nan
        for name, (inside, out) in first.items()
    }
    own: dict[str, float] = {}
    measured = []
    for step in range(steps + 1):
        now = _seen(net, layers, x) if step else first
        for name, (inside, before) in first.items():
            update = math.nan
            if step and name not in own:
                with torch.no_grad():
                    update = size(layers[name](inside) - before)
                if update > ROUNDING * torch.finfo(before.dtype).eps * size(before):
                    own[name] = update
                else:
                    update = math.nan
            out = now[name][1]
            gain = math.nan if step else gains[name]
            measured.append(
                Measured(width, seed, step, name, size(out), size(out - before), gain, update)
            )
        if step < steps:
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
    return measured


@torch.no_grad()
def _seen(
    net: nn.Module, layers: dict[str, nn.Module], x: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer receives and hands on for `x`, by name, in order of execution."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            found[name] = (args[0], out)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def size(h: Tensor) -> float:
    """The root mean square over samples of the norm of h [b ...]."""
    return math.sqrt(float(h.detach().double().flatten(1).square().sum(1).mean()))


def _findings(measured: list[Measured], exponent: float, tolerance: float) -> list[Finding]:
    """What is off: gains, or own updates where all gains are right, as these follow from them."""
    names = list(dict.fromkeys(m.layer for m in measured))
    readout, first = _means(measured, names[-1], "own_update")
    for what in ("gain", "own_update"):
        found = []
        for name in names:
            sizes, step = _means(measured, name, what)
            if what == "own_update" and step > first:
                # it grew with the readout: what is wrong with that is not to be found here again
                sizes = {width: value / readout[width] for width, value in sizes.items()}
                sizes = {w: value * readout.get(INFINITY, 1.0) for w, value in sizes.items()}
            judged = _judged(name, what, sizes)
            if _wrong(judged, exponent, tolerance):
                found.append(judged)
        if found:
            break
    return found


def _means(measured: list[Measured], layer: str, what: str) -> tuple[dict[float, float], int]:
    """The mean over seeds by width, and the step at which it was measured."""
    values: dict[float, list[float]] = {}
    step = 0
    for m in measured:
        value = getattr(m, what)
        if m.layer == layer and not math.isnan(value):
            values.setdefault(m.width, []).append(value)
            step = m.step
    return {width: sum(found) / len(found) for width, found in values.items()}, step


def _judged(layer: str, what: str, sizes: dict[float, float]) -> Finding:
    finite = {width: value for width, value in sizes.items() if width != INFINITY}
    positive = {width: value for width, value in finite.items() if value > 0}
    power = _slope(positive) if len(positive) > 1 else 0.0
    ratio = math.nan
    if finite and INFINITY in sizes:
        last, limit = finite[max(finite)], sizes[INFINITY]
        ratio = 1.0 if last == limit else math.inf
        if limit:
            ratio = last / limit
    return Finding(layer, what.replace("_", " "), power, ratio)


def _wrong(found: Finding, exponent: float, tolerance: float) -> bool:
    if abs(found.exponent) > exponent:
        return True
    known = not math.isnan(found.ratio)
    return known and not 1 / (1 + tolerance) <= found.ratio <= 1 + tolerance


def _slope(sizes: dict[float, float]) -> float:
    """The exponent of n, by least squares in logarithms."""
    points: list[tuple[float, float]] = [(math.log(w), math.log(v)) for w, v in sizes.items()]
    middle = [sum(column) / len(points) for column in zip(*points)]
    across = sum((a - middle[0]) * (b - middle[1]) for a, b in points)
    return across / sum((a - middle[0]) ** 2 for a, _ in points)


def records(check: CoordCheck) -> list[dict[str, Any]]:
    """One dictionary per layer, quantity and step, for a long table."""
    return [
        {
            "width": m.width,
            "seed": m.seed,
            "step": m.step,
            "layer": m.layer,
            "quantity": quantity,
            "size": getattr(m, quantity.replace(" ", "_")),
        }
        for m in check.measured
        for quantity in QUANTITIES
        if not math.isnan(getattr(m, quantity.replace(" ", "_")))
    ]
