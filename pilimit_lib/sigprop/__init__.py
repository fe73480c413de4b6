"""Signal propagation: networks that learn in the forward pass. A signal in front, a propagator
around each layer."""

from . import functional, loss, managers, models, monitors, propagators, signals, utils
from .flow import Flow
from .statistics import recalibrate
from .wrapping import wrap

__all__ = [
    "Flow",
    "functional",
    "loss",
    "managers",
    "models",
    "monitors",
    "propagators",
    "recalibrate",
    "signals",
    "utils",
    "wrap",
]
