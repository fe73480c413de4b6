"""An existing network made to learn in its forward pass, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from . import propagators
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

    `network`: an nn.Sequential, a list of blocks, or a module that holds one (name it with `blocks`
    if it holds several). Each block is what learns as one; blocks without trainable parameters are
    only passed through. `signal`: a signal, such as `signals.project_labels(...)`; it learns too if
    it has trainable parameters. `optimizer`: function module -> optimiser, called for each block.
    `loss`: as in `sigprop.loss`. `output`: blocks from this one on are trained by the caller's loss
    on what `net` returns; None: there are none. `monitor`: class such as
    `monitors.loss.LabelMetrics` put around each loss, instances added to the group `monitors`.
    `nonfinite`: whether batches that are not finite "raise", or are passed over ("skip").
    Blocks are wrapped, not copied: the given network shares its parameters with the result.
    """
    layers = _blocks(network, blocks)
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


def _blocks(network, name: str | None) -> list[nn.Module]:
    if isinstance(network, nn.Sequential | nn.ModuleList | list | tuple):
        found = list(network)
    elif isinstance(network, nn.Module):
        lists = {
            key: child
            for key, child in network.named_children()
            if isinstance(child, nn.Sequential | nn.ModuleList)
        }
        if name is None and len(lists) != 1:
            raise ValueError(
                f"{type(network).__name__} holds {len(lists)} lists of blocks, {sorted(lists)}; "
                "say which: blocks='...'"
            )
        key = name or next(iter(lists))
        if key not in lists:
            raise ValueError(
                f"{type(network).__name__} has no list of blocks called {key!r}; it has "
                f"{sorted(lists)}"
            )
        found = list(lists[key])
        inside = {id(p) for block in found for p in block.parameters()}
        outside = [path for path, p in network.named_parameters() if id(p) not in inside]
        if outside:
            raise ValueError(
                f"parameters {outside} of {type(network).__name__} lie outside of the blocks "
                f"'{key}', whose chain "
                "alone is wrapped; give what comes before to the signal (module_input) and what "
                "comes after as a "
                "last block"
            )
    else:
        raise TypeError(
            "network must be an nn.Sequential, a list of blocks or a module that holds one, "
            f"got {type(network).__name__}"
        )
    if not found or not all(isinstance(block, nn.Module) for block in found):
        raise ValueError(
            "the network has no blocks" if not found else "every block must be an nn.Module"
        )
    return found
