"""What forward passes move, and the way back: a batch that is refused leaves nothing changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .counters import Neurons
from .tracked import TrackedNetwork


class ForwardState:
    """The buffers of a model (running statistics of norms, averages of the user's own), its
    counters and the age of a network that counts its own, as they are now.

    Layers whose buffers grow are left out: their rows are made by steps, not in forward passes.
    """

    def __init__(self, module: nn.Module, neurons: Iterable[Neurons]) -> None:
        parts = [part for part in module.modules() if not hasattr(part, "restructure")]
        self.held: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (part, name, buffer, buffer.detach().clone())
            for part in (*parts, *neurons)
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        self.ages = [(part, part.age) for part in parts if isinstance(part, TrackedNetwork)]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring all of it back; buffers stay the same objects."""
        for part, name, buffer, value in self.held:
            if not torch.equal(buffer, value):  # writing unasked would spoil graphs still alive
                buffer.copy_(value)
            part._buffers[name] = buffer
        for part, age in self.ages:
            part.__dict__["_age"] = age
