"""An existing network made to learn in its forward pass, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from . import propagators
from .blocks import blocks_of
from .loss import v9_input_target_max_all
from .models import Forward, Model
from .propagators import Propagator


def wrap(
    network: nn.Module | Sequence[nn.Module],
    *,
    signal: nn.Module,
    optimizer: Callable,
    loss: Callable = v9_input_target_max_all,
    output: int | None = -1,
    blocks: str | None = None,
    fuse: bool | str = "auto",
    model: Callable[..., Model] = Forward,
    monitors=None,
    monitor: Callable | None = None,
    nonfinite: str = "raise",
) -> Model:
    """The network as a model whose blocks learn locally: `net(x, y)` trains them, `net(x)` in
    evaluation predicts.

    `network`: an nn.Sequential, a list of blocks, a module that holds one (name it with `blocks` if
    it holds several), or one whose forward runs its parts one after the other, such as a
    torchvision ResNet or VGG: see `blocks.follow_forward` for where it is cut. Each block is what
    learns as one; blocks without trainable parameters are only passed through. Blocks are wrapped,
    not copied: the given network shares its parameters with the result.

    `signal`: a signal, such as `signals.project_labels(...)`; it learns too if it has trainable
    parameters. `optimizer`: function module -> optimiser, called for each block. `loss`: as in
    `sigprop.loss`. `output`: blocks from this one on are trained by the caller's loss on what `net`
    returns; None: there are none. `monitor`: class such as `monitors.loss.LabelMetrics` put around
    each loss, instances added to the group `monitors`. `nonfinite`: whether batches that are not
    finite "raise", or are passed over ("skip").
    """
    layers = blocks_of(network, blocks)
    if output is None:
        hidden, last = layers, []
    else:
        if not -len(layers) <= output < len(layers):
            raise ValueError(f"output={output} is none of the {len(layers)} blocks")
        hidden, last = layers[:output], layers[output:]

    def learning(cls: type, fixed: type, module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, Propagator):
            return module
        if not any(p.requires_grad for _, p in module.named_parameters()):
            return fixed(module)
        watched = loss
        if monitor is not None:
            watched = monitor(name, loss)
            if monitors is not None:
                monitors.add(watched)
        return cls(module, loss=watched, fuse=fuse)

    wrapped = [
        learning(propagators.Loss, propagators.Fixed, block, f"{i}:{type(block).__name__}")
        for i, block in enumerate(hidden)
    ]
    wrapped += [
        block if isinstance(block, Propagator) else propagators.Identity(block) for block in last
    ]
    first = learning(
        propagators.signals.Loss,
        propagators.signals.Fixed,
        signal,
        f"signal:{type(signal).__name__}",
    )
    made = model(nn.Sequential(*wrapped), first, optimizer=optimizer)
    made.nonfinite = nonfinite
    return made
