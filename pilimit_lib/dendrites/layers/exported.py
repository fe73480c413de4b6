"""A grown layer without what growing needs: for inference, export and further plain training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .dimensions import along


class PlainDendritic(nn.Module):
    """y = f(x) + Σ_k w_k ⊙ a_k with a fixed number of dendrites: weights w [K n] and v [K(K−1)/2
    n], rows of v in the order of (k, j<k)."""

    def __init__(
        self,
        neuron: nn.Module,
        bodies: list[nn.Module],
        w: Tensor,
        v: Tensor,
        axis: int,
        activate: Callable[[Tensor], Tensor],
        processors: list | None = None,
    ):
        super().__init__()
        self.neuron, self.bodies = neuron, nn.ModuleList(bodies)
        self.w, self.v = nn.Parameter(w), nn.Parameter(v)
        self.axis, self.activate = axis, activate
        self.processors = processors  # the neurons' first, then one for each dendrite

    @staticmethod
    def of(layer) -> nn.Module:
        """The plain form of a DendriticLayer, sharing its tensors where they keep their shape; its
        neurons alone, if nothing grew."""
        grown = [d for d in layer.dendrites if not d.candidate]
        if not grown:
            return layer.neuron
        earlier = [d.v.detach() for d in grown if d.v is not None]
        w = torch.stack([d.w.detach() for d in grown])
        processors = (
            [layer.processor, *(d.processor for d in grown)]
            if layer.processor is not None
            else None
        )
        plain = PlainDendritic(
            layer.neuron,
            [d.body for d in grown],
            w,
            torch.cat(earlier) if earlier else w[:0],
            layer.axis,
            layer.config.activate,
            processors,
        )
        return plain.train(layer.training)

    def forward(self, *args, **kwargs):
        output = self.neuron(*args, **kwargs)
        y = output if self.processors is None else self.processors[0].post_n1(output)
        activations: list[Tensor] = []
        for k, body in enumerate(self.bodies):
            if self.processors is None:
                z = body(*args, **kwargs)
            else:
                own_args, own_kwargs = self.processors[1 + k].pre_d(*args, **kwargs)
                z = self.processors[1 + k].post_d(body(*own_args, **own_kwargs))
            for j, a in enumerate(activations):
                z = z + along(self.v[k * (k - 1) // 2 + j], z, self.axis) * a
            activations.append(self.activate(z))
            y = y + along(self.w[k], y, self.axis) * activations[-1]
        return y if self.processors is None else self.processors[0].post_n2(y)

    def __getstate__(self):
        for processor in self.processors or ():
            processor.clear_processor()
        return self.__dict__
