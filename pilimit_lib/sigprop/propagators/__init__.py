"""Propagators: each wraps one block of a network, carries both streams through it and, if it
learns, trains it there and then."""

from . import functional, signals
from .base import Propagator
from .finite import NonFinite
from .learn import Learn, Loss
from .other import Fixed, Forward, Identity

__all__ = [
    "Fixed",
    "Forward",
    "Identity",
    "Learn",
    "Loss",
    "NonFinite",
    "Propagator",
    "functional",
    "signals",
]
