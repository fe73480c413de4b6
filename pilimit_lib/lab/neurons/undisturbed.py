"""Running the model for our own purposes without leaving a trace: no counts, no buffers moved, no
randomness spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core import rng_state, set_rng_state
from ..network import NetworkWithOps, NeuronOps
from .counters import TrackingMode


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without tracking; afterwards modes, buffers, ages and generators are as they
    were."""
    modes = [(module, module.training) for module in model.modules()]
    tracking = [(m, m.tracking_mode) for m in model.modules() if isinstance(m, NeuronOps)]
    networks = [
        (m, m.__dict__["_tracking_mode"]) for m in model.modules() if isinstance(m, NetworkWithOps)
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    generators = rng_state()
    try:
        model.eval()
        for layer, _ in tracking:
            layer.tracking_mode = TrackingMode.DISABLED
        for network, _ in networks:
            network.__dict__.update(_tracking_mode=TrackingMode.DISABLED, _modes_spread=True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, mode in tracking:
            layer.tracking_mode = mode
        for network, mode in networks:
            network.__dict__.update(_tracking_mode=mode, _modes_spread=False)
        with torch.no_grad():
            for buffer, value in buffers:
                # writing unasked would spoil graphs that are still alive
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        set_rng_state(generators)


def tensors_in(value: Any) -> list[Tensor]:
    """Every floating-point tensor in what a model returned, whatever it is packed in."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    return (
        [tensor for entry in value for tensor in tensors_in(entry)]
        if isinstance(value, list | tuple)
        else []
    )


def answers(
    model: nn.Module, example: tuple, replaced: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """What the model says about the example, with some parameters replaced for this one call."""
    generators = rng_state()
    with torch.no_grad():
        output = (
            torch.func.functional_call(model, replaced, example) if replaced else model(*example)
        )
    set_rng_state(generators)
    return tensors_in(output)
