"""What the lab answers to requests that it cannot carry out; each is also the builtin error that
fits."""


class NotFound(LookupError, ValueError):
    """A layer, neuron, sample, tag or checkpoint that does not exist."""


class Refused(ValueError):
    """An edit that would not mean what it says; the message gives the reason, and nothing has
    changed."""
