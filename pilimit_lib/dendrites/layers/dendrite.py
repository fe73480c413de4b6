"""One dendrite of a layer."""

import torch
from torch import Tensor, nn

from ...core import Change
from .correlation import CorrelationStats
from .dimensions import along
from .standardise import standardise


class Dendrite(nn.Module):
    """One dendrite d_k with its weights w_k [n] and, from the second on, v_k [k n] from the earlier
    ones.

    A candidate is a dendrite in its correlation phase: it sees the layer's input, learns from the
    error, and adds nothing yet.
    """

    def __init__(
        self,
        body: nn.Module,
        neurons: int,
        earlier: int,
        like: Tensor,
        processor=None,
        candidate: bool = False,
    ):
        super().__init__()
        self.body = body
        self.processor = processor
        self.w = nn.Parameter(like.new_zeros(neurons))
        self.register_parameter(
            "v", nn.Parameter(like.new_zeros(earlier, neurons)) if earlier else None
        )
        self.stats = CorrelationStats(neurons, like) if candidate else None
        self.shifts: Tensor | None = None  # until its first batch, where it begins standardised

    @property
    def candidate(self) -> bool:
        return self.stats is not None

    def inner(
        self, args: tuple, kwargs: dict, activations: list[Tensor], axis: int, perforated: bool
    ) -> Tensor:
        """The pre-activation z_k for inputs of the layer and the earlier dendrites' activations."""
        if self.processor is not None:
            args, kwargs = self.processor.pre_d(*args, **kwargs)
        if perforated:
            args, kwargs = _detached(args), _detached(kwargs)
        if self.shifts is not None and self.training and torch.is_grad_enabled():
            with torch.no_grad():
                standardise(self.body, self.body(*args, **kwargs), axis, self.shifts)
            self.shifts = None
        z = self.body(*args, **kwargs)
        if self.processor is not None:
            z = self.processor.post_d(z)
        for j, a in enumerate(activations):
            z = z + along(self.v[j], z, axis) * (a.detach() if self.candidate else a)
        return z


def _detached(value):
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        items = [_detached(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    return value


def removing(dendrite: Dendrite) -> Change:
    """The parameters of a dendrite that is no longer part of its layer."""
    change = Change()
    for parameter in dendrite.parameters():
        change += Change.removing(parameter)
    return change
