"""A network tried out before it learns: a block that does not fit must not be found after others
made their step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import batch
from ..propagators.base import propagators_in


def fits(model, x: Tensor) -> None:
    """Infer two samples, without learning; an error says which propagator raised it."""
    entered: list[str] = []
    handles = [
        propagator.register_forward_pre_hook(lambda module, args, name=name: entered.append(name))
        for name, propagator in propagators_in(model)
    ]
    try:
        # two samples are not the batch that the ambient ids name
        with evaluation(model), torch.no_grad(), batch(None):
            model.forward((x[:2], None))
    except Exception as error:
        if entered:
            name = entered[-1]
            error.add_note(
                f"raised in '{name}' ({model.get_submodule(name)}) by a first try with two "
                "samples, "
                "before any layer has learnt"
            )
        raise
    finally:
        for handle in handles:
            handle.remove()


class evaluation:
    """`with evaluation(model)`: every module in evaluation, afterwards each as it was."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.modes = {module: module.training for module in self.model.modules()}
        self.model.eval()

    def __exit__(self, *error) -> None:
        for module, training in self.modes.items():
            module.training = training
