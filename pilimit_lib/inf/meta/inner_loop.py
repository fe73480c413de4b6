"""MAML: inner steps of many tasks at once on one network, which itself stays as it is.

    adapted = adapt(net, x, y, step_size=0.5, readout_only=True)
    loss = cross_entropy(adapted(x_query), y_query).mean()
    loss.backward()
    clip_grad_norm_(net, 0.1)
    optimizer.step()

x [t b d] and y [t b] are t tasks of b samples; `backward` leaves the meta-gradient, of second
order, where any other loss leaves its own.

An inner step of a task appends *fast rows* beside the network (see `meta.layers`), which the next
task never sees: nothing is copied per task and nothing has to be rewound. A step on moments V − η
∂L/∂V, or on the weights of a finite network, is the same rows. Fast rows are on the tape, so second
order is plain autograd. Index legend: t tasks, b samples, m fast rows, r rank in, o outputs.
Source: Finn, Abbeel & Levine 2017; Yang, Santacroce & Hu 2022, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import InfPiLinearReLU
from .layers import Keys, kernel, keys, projected

TaskLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of each task [t], of outputs [t b o] and labels [t b]."""
    return (
        F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        .view(labels.shape)
        .mean(1)
    )


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error of each task [t], of outputs and targets [t b o]."""
    return (outputs - targets).square().flatten(1).mean(1)


def smooth_l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean Huber loss (δ = 1) of each task [t], of outputs and targets [t b o]."""
    return F.smooth_l1_loss(outputs, targets, reduction="none").flatten(1).mean(1)


@dataclass
class FastRows:
    """What the inner steps of all tasks have added to one layer: rows (keys, values [t m o]) and a
    shift of the bias [t 1 o]."""

    keys: Tensor | None = None
    values: Tensor | None = None
    shift: Tensor | None = None

    def add(
        self, seen: Keys, delta: Tensor, rate: float, shift: Tensor | None, detach: bool
    ) -> None:
        """Append the rows of one step of size `rate` on output gradients `delta` [t b o]."""
        values = -rate * (delta if seen.scale is None else seen.scale * delta)
        features = seen.features
        if detach:
            values, features = values.detach(), features.detach()
            shift = None if shift is None else shift.detach()
        self.keys = features if self.keys is None else torch.cat([self.keys, features], 1)
        self.values = values if self.values is None else torch.cat([self.values, values], 1)
        if shift is not None:
            self.shift = shift if self.shift is None else self.shift + shift

    def output(self, layer: nn.Module, seen: Keys) -> Tensor:
        """What they add to the outputs of `layer`: [t b o]."""
        out = kernel(layer, seen.features, self.keys) @ self.values
        out = out if seen.scale is None else out * seen.scale
        return out if self.shift is None else out + self.shift


class Adapted:
    """A network after inner steps: a function of query inputs [t b d] to outputs [t b o], task by
    task. See `adapt`."""

    def __init__(self, net: nn.Module, layers: list[int], tasks: int) -> None:
        self.net, self.tasks = net, tasks
        self.fast = {number: FastRows() for number in layers}

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or len(x) != self.tasks:
            raise ValueError(
                f"the network was adapted to {self.tasks} tasks, so inputs [{self.tasks} b d] were "
                "expected, "
                f"got {list(x.shape)}"
            )
        return self._run(x, None)

    def step(
        self,
        x: Tensor,
        y: Tensor,
        loss: TaskLoss,
        rate: float,
        bias_rate: float,
        project: bool | None,
        second_order: bool,
    ) -> None:
        """One inner step of every task."""
        taps: dict[int, tuple[Keys, Tensor]] = {}
        outputs = self._run(x, taps)
        losses = loss(outputs, y)
        if losses.shape != (self.tasks,):
            raise ValueError(
                f"the loss must return one number per task, [{self.tasks}], got "
                f"{list(losses.shape)}"
            )
        deltas = torch.autograd.grad(
            losses.sum(), [out for _, out in taps.values()], create_graph=second_order
        )
        for (number, (seen, _)), delta in zip(taps.items(), deltas):
            layer, shift = self.net.layers[number], None
            delta = projected(layer, delta, project)
            if layer.bias is not None:
                shift = -bias_rate * layer.bias_alpha**2 * delta.sum(1, keepdim=True)
            self.fast[number].add(seen, delta, rate, shift, not second_order)

    def _run(self, x: Tensor, taps: dict[int, tuple[Keys, Tensor]] | None) -> Tensor:
        """Outputs; `taps` receives what each adapted layer saw, and its outputs as points of the
        tape."""
        net, z, last = self.net, x, len(self.net.layers) - 1
        for number, layer in enumerate(net.layers):
            out = layer(z.flatten(0, 1)).unflatten(0, z.shape[:2])
            if number in self.fast:
                seen, fast = keys(layer, z), self.fast[number]
                if fast.keys is not None:
                    out = out + fast.output(layer, seen).to(out)
                if taps is not None:
                    taps[number] = seen, out if out.requires_grad else out.requires_grad_()
            z = out * net.first_layer_alpha if number == 0 and last else out
        return z * net.last_layer_alpha


def adapt(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    step_size: float,
    steps: int = 1,
    loss: TaskLoss = cross_entropy,
    readout_only: bool = False,
    body_only: bool = False,
    second_order: bool = True,
    project: bool | None = None,
    bias_lr_mult: float = 1,
) -> Adapted:
    """Take inner steps of plain SGD on the support sets of all tasks; returns the adapted network,
    and leaves `net` alone.

    Args:
        net: InfMLP, FinPiMLPSample or KernelMLP.
        x, y: support sets of t tasks, x [t b d] and y as `loss` takes it (labels [t b]).
        loss: of outputs [t b o] and y, one number per task [t].
        readout_only: adapt the readout; body_only: everything else. Default: all layers.
        second_order: keep the inner steps on the tape. False holds what they add constant (and
            builds no graph), which is what first-order MAML and evaluation need.
        project: project inner gradients of finite layers onto the range of Ω, as the infinite limit
            demands. Default: where the layer projects its own (`layer.project`), so in π-networks,
            not in μ-networks.
        bias_lr_mult: multiplies the step size for biases.
    Raises:
        ValueError: second order through adapted layers of rows (or fused moments) below the
            readout. The meta-gradient is then not a sum of ReLU rows; moments hold it.
    """
    chosen = _layers(net, readout_only, body_only)
    _check(net, x, chosen, steps, step_size, second_order)
    adapted = Adapted(net, chosen, len(x))
    with torch.enable_grad():
        for _ in range(steps):
            if second_order:
                adapted.step(x, y, loss, step_size, step_size * bias_lr_mult, project, True)
            else:
                with _frozen(net):
                    adapted.step(x, y, loss, step_size, step_size * bias_lr_mult, project, False)
    return adapted


@torch.no_grad()
def readout_kernel(net: nn.Module, left: Tensor, right: Tensor) -> Tensor:
    """Inner products of what the readout of `net` sees of inputs [t a d] and [t b d], task by task:
    [t a b]."""
    seen = []
    for x in (left, right):
        taps: dict[int, tuple[Keys, Tensor]] = {}
        Adapted(net, [len(net.layers) - 1], len(x))._run(x, taps)
        seen += [found for found, _ in taps.values()]
    products = kernel(net.layers[-1], *(found.features for found in seen))
    return products if seen[0].scale is None else seen[0].scale * products * seen[1].scale.mT


@contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    """Inside the `with`, no parameter needs a gradient, so that backward passes leave none
    behind."""
    held = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def _layers(net: nn.Module, readout_only: bool, body_only: bool) -> list[int]:
    if not isinstance(getattr(net, "layers", None), nn.ModuleList):
        raise TypeError(
            "adapt needs a network with a ModuleList `layers` (InfMLP, FinPiMLPSample, "
            "KernelMLP), "
            f"got {type(net).__name__}"
        )
    if readout_only and body_only:
        raise ValueError("readout_only and body_only together leave nothing to adapt")
    count = len(net.layers)
    if body_only and count == 1:
        raise ValueError(
            f"a {type(net).__name__} is a readout only: body_only leaves nothing to adapt"
        )
    return [count - 1] if readout_only else list(range(count - 1 if body_only else count))


def _check(
    net: nn.Module, x: Tensor, chosen: list[int], steps: int, step_size: float, second_order: bool
) -> None:
    if x.ndim != 3:
        raise ValueError(
            f"inputs [t b d] of t tasks were expected, got {list(x.shape)}; flatten images, and "
            "give a single task "
            "as x[None]"
        )
    if steps < 0 or step_size < 0:
        raise ValueError(f"steps and step_size must not be negative, got {steps} and {step_size}")
    if not second_order:
        return
    # The inner gradient of a layer passes through all layers above it, which second order
    # differentiates a second time.
    for number in range(min(chosen) + 1, len(net.layers)):
        layer = net.layers[number]
        if isinstance(layer, InfPiLinearReLU) or getattr(layer, "fused", False):
            what = "rows" if isinstance(layer, InfPiLinearReLU) else "fused moments"
            raise ValueError(
                f"second order through layer {number}, which is made of {what}, while layer "
                f"{min(chosen)} below it "
                "is adapted: take readout_only=True, second_order=False, or moments with "
                "fused=False"
            )
