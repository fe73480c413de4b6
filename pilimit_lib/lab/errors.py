"""What the lab answers to requests that it cannot carry out; each is also the builtin error that
fits."""


class NotFound(LookupError, ValueError):
    """A layer, neuron, sample, tag or checkpoint that does not exist."""


class Refused(ValueError):
    """An edit that would not mean what it says; the message gives the reason, and nothing has
    changed."""


class NonFinite(ArithmeticError):
    """A loss that is NaN or infinite, found before anything was learned from it. `ids` are the
    samples that it belongs to, `suspects` those of the batch whose own data is not finite."""

    def __init__(self, message: str, ids: list[int], suspects: list[int]) -> None:
        super().__init__(message)
        self.ids, self.suspects = ids, suspects
