"""Monitors: numbers of single layers while they learn."""

from . import loss
from .group import Group
from .memory import Memory
from .time import Time

__all__ = ["Group", "Memory", "Time", "loss"]
