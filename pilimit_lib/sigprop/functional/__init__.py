"""Signal propagation without modules: the three routers, the formatters and the parts of the
losses."""

from . import propagators, signals
from .contrast import contrast, labels_of, partners, similarity

__all__ = ["contrast", "labels_of", "partners", "propagators", "signals", "similarity"]
