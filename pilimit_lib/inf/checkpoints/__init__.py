"""What network a checkpoint is of, and checkpoints of the original code."""

from .original import read_pilimit_orig, to_pilimit_orig

__all__ = ["read_pilimit_orig", "to_pilimit_orig"]
