"""Models: a signal before, propagators behind, called like any network."""

from .local import Schedule
from .model import Forward, ForwardLoopBack, LoopBack, Model

__all__ = ["Forward", "ForwardLoopBack", "LoopBack", "Model", "Schedule"]
