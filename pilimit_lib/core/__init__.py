"""A dimension that changes size while training: what the four rooms share. Imports torch only."""

from .archive import read_archive
from .axis import Axis, Mark, Member
from .batch import UNKNOWN, batch, current_ids, sample_ids
from .blocks import BLOCK_ROWS, Blocks
from .change import Change, Edit, Source
from .checkpoint import Growable, load, restore, save, snapshot
from .files import full_disk, replacing, write_bytes, write_json, write_text
from .follow import follow, parameters_of
from .memory import free_memory
from .part import Allocate, StoredRows, in_memory
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
    "Source",
    "StoredRows",
    "UNKNOWN",
    "batch",
    "current_ids",
    "follow",
    "free_memory",
    "full_disk",
    "in_memory",
    "load",
    "parameters_of",
    "read_archive",
    "replacing",
    "restore",
    "rng_state",
    "sample_ids",
    "save",
    "set_rng_state",
    "snapshot",
    "write_bytes",
    "write_json",
    "write_text",
]
