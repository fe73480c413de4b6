"""Whether a checkpoint fits a network, and checkpoints of the original code."""

from .original import read_pilimit_orig, to_pilimit_orig

__all__ = ["read_pilimit_orig", "to_pilimit_orig"]
