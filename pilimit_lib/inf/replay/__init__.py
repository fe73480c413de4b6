"""A run trained again without some of its samples, and what leaving them out would do."""

from .influence import Influence, influence
from .record import Recorder, RunRecord
from .retrain import cross_entropy_each, replay
from .subsets import replay_subsets

__all__ = [
    "Influence",
    "Recorder",
    "RunRecord",
    "cross_entropy_each",
    "influence",
    "replay",
    "replay_subsets",
]
