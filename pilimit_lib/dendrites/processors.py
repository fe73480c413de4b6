"""Processors: how layers with several tensors in or out lend one tensor to be combined with their
dendrites'.

The neurons' instance sees post_n1(output) -> tensor, then post_n2(combined tensor) -> output as the
caller expects it.
Each dendrite has an instance of its own: pre_d(*inputs) -> (args, kwargs) for the dendrite,
post_d(its output) -> tensor. Any class with these four methods and clear_processor() will do; it is
built without arguments.
"""

import torch
from torch import Tensor


class Processor:
    """One tensor in, one tensor out: nothing to process. Base of the others."""

    def post_n1(self, output):
        return output

    def post_n2(self, combined):
        return combined

    def pre_d(self, *args, **kwargs):
        return args, kwargs

    def post_d(self, output):
        return output

    def clear_processor(self) -> None:
        """Forget what was kept between the calls; done at every save and copy."""
        self.__dict__.clear()

    def __deepcopy__(self, memo):
        return type(self)()


class MultiOutputProcessor(Processor):
    """Combine the first output and hand the others on as the neurons gave them."""

    def post_n1(self, output):
        if not isinstance(output, (tuple, list)):
            raise TypeError(
                "MultiOutputProcessor expects a layer that returns a tuple, got "
                f"{type(output).__name__}; "
                "a layer with one output needs no processor"
            )
        self.kind, self.rest = type(output), tuple(output[1:])
        return output[0]

    def post_n2(self, combined):
        values = (combined, *self.rest)
        return self.kind(*values) if hasattr(self.kind, "_fields") else self.kind(values)

    def post_d(self, output):
        return output[0]


def _beginning(states: tuple[Tensor, ...]) -> Tensor:
    """Which sequences begin: those whose given states are zero in every entry, [1 b 1] or [b 1].

    Decided for each sequence by itself and without reading values back from the device; a state
    whose entries merely cancel in their sum is no beginning.
    """
    begins = torch.stack([(s == 0).all(dim=-1, keepdim=True) for s in states]).all(dim=0)
    # [layers b h]: all layers must begin
    return begins.all(dim=0, keepdim=True) if begins.dim() == 3 else begins


class _Recurrent(Processor):
    """A layer f(x, state) -> (out, state) whose dendrites keep a hidden state of their own (DHT)
    beside the neurons' (NHT)."""

    own = None

    def post_n1(self, output):
        self.neuron_state = output[1]
        return output[0]

    def post_n2(self, combined):
        return combined, self.neuron_state

    def pre_d(self, inputs, state=None, **kwargs):
        state = kwargs.pop("hx", state)
        if state is None or self.own is None or not self._fits(state):
            return (inputs, state), kwargs
        given, own = (state, self.own) if isinstance(state, tuple) else ((state,), (self.own,))
        begins = _beginning(given)
        # a caller who detached the state cuts the sequence for backpropagation: the dendrite's
        # state is cut with it
        mixed = tuple(
            torch.where(begins, s, o if s.requires_grad else o.detach()) for s, o in zip(given, own)
        )
        return (inputs, mixed if isinstance(state, tuple) else mixed[0]), kwargs

    def _fits(self, state) -> bool:
        given, own = (state[0], self.own[0]) if isinstance(state, tuple) else (state, self.own)
        return given.shape == own.shape

    def post_d(self, output):
        self.own = output[1]
        return output[0]


class GRUProcessor(_Recurrent):
    """nn.GRU: (x, h) -> (out, h). The output is combined; the dendrite keeps its own h."""


class LSTMProcessor(_Recurrent):
    """nn.LSTM: (x, (h, c)) -> (out, (h, c)). The output is combined; the dendrite keeps its own h
    and c."""


class LSTMProcessorLastHidden(LSTMProcessor):
    """nn.LSTM in networks that read the last hidden state: h is combined, and returned in place of
    the neurons' h.

    The neurons' axis then is that of h [layers b hidden]: set_this_input_dimensions([-1, -1, 0]).
    """

    def post_n1(self, output):
        self.sequence, (hidden, self.cell) = output
        return hidden

    def post_n2(self, combined):
        return self.sequence, (combined, self.cell)

    def post_d(self, output):
        self.own = output[1]
        return output[1][0]


class LSTMCellProcessor(_Recurrent):
    """nn.LSTMCell: (x, (h, c)) -> (h, c). h is combined; the dendrite keeps its own h and c."""

    def post_n1(self, output):
        hidden, self.cell = output
        return hidden

    def post_n2(self, combined):
        return combined, self.cell

    def post_d(self, output):
        self.own = output
        return output[0]
