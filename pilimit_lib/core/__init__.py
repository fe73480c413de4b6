"""A dimension that changes size while training: what the four rooms share. Imports torch only."""

from .axis import Axis, Mark, Member
from .batch import UNKNOWN, batch, current_ids
from .blocks import BLOCK_ROWS, Blocks
from .change import Change, Edit, Source
from .checkpoint import Growable, load, restore, save, snapshot
from .follow import follow, parameters_of
from .part import Allocate, Part, in_memory
from .rng import rng_state, set_rng_state

__all__ = [
    "Allocate",
    "Axis",
    "BLOCK_ROWS",
    "Blocks",
    "Change",
    "Edit",
    "Growable",
    "Mark",
    "Member",
    "Part",
    "Source",
    "UNKNOWN",
    "batch",
    "current_ids",
    "follow",
    "in_memory",
    "load",
    "parameters_of",
    "restore",
    "rng_state",
    "save",
    "set_rng_state",
    "snapshot",
]
