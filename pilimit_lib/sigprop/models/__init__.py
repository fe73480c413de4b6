"""Models: a signal before, propagators behind, called like any network."""

from .base import Model
from .local import Schedule
from .model import Forward, ForwardLoopBack, LoopBack

__all__ = ["Forward", "ForwardLoopBack", "LoopBack", "Model", "Schedule"]
