"""What a signal is: the part before the first layer that turns a context into a target stream."""

from __future__ import annotations

from torch import nn


class Signal(nn.Module):
    """A step on the pair (h, t) of input and context, either of which it may change."""

    # True where the target rows that leave this module stand for classes 0 .. classes - 1 and not
    # for the samples of the batch.
    class_rows = False

    @classmethod
    def manage(cls, manager, *args, **kwargs):
        """Build this signal with the given arguments and hand it to `manager.set_signal`."""
        return manager.set_signal(cls(*args, **kwargs))


class Formatter(Signal):
    """Changes the form of the context: `forward((h, t))` returns `(h, t')`; at inference t is None
    and must pass."""


class Generator(Signal):
    """Makes the streams: `forward((h0, t0))` returns `(h1, t1, h0, t0)`, where h0 and t0 are what
    the losses compare by.

    At inference t0 is None. A generator whose forward does not expect that can name the shape of
    one context row as `self.input_shape`: it then runs on zeros in place of the context, and what
    it makes of them is dropped.
    """

    # True where forward itself copes with t0 None.
    context_optional = False

    def __call__(self, input):
        h, t = input
        if t is not None or self.context_optional:
            return super().__call__((h, t))
        shape = getattr(self, "input_shape", None)
        if shape is None:
            raise ValueError(
                f"{type(self).__name__} was called without a context (inference) and does not say "
                "how to go on: set "
                "context_optional = True and return (h1, None, h0, None), or set self.input_shape"
            )
        h1, _, h0, _ = super().__call__((h, h.new_zeros(len(h), *shape)))
        return h1, None, h0, None
