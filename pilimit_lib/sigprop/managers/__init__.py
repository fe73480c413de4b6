"""Managers: settings once, up front, for wrapping the layers of an existing model."""

from .manager import Manager, Prepared, Preset

__all__ = ["Manager", "Prepared", "Preset"]
