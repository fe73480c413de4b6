"""Global settings ``pc`` and the tracker ``pai_tracker``, as the documented system has them: the
only global state, kept thin."""

import sys
import types
from typing import Any

from .. import spelling
from ..conversion import PAISequential
from .pc import LISTS, PAIConfig, pc
from .tracker import PAINeuronModuleTracker

__all__ = ["PAIConfig", "PAISequential", "PAINeuronModuleTracker", "pai_tracker", "pc"]


class _Module(types.ModuleType):
    """The facade's module: old spellings of settings can be read and assigned as
    ``GPA.moduleIDsToTrack += [...]``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setting = spelling.respell(name, LISTS)
        if setting is not None:
            spelling.warn_once(f"GPA.{name}", f"GPA.pc.append_{setting}([...])")
            return self.pc._get(setting)
        meant = spelling.respell(name, ["PAISequential", "pai_tracker", "pc"])
        if meant is None:
            raise spelling.unknown("GPA", name, ["PAISequential", "pai_tracker", "pc", *LISTS])
        spelling.warn_once(f"GPA.{name}", f"GPA.{meant}")
        return getattr(self, meant)

    def __setattr__(self, name: str, value: Any) -> None:
        setting = spelling.respell(name, LISTS) if name not in self.__dict__ else None
        if setting is not None:
            self.pc._set(setting, value)
        else:
            super().__setattr__(name, value)


pai_tracker = PAINeuronModuleTracker()
pc.read_dendrites_from(lambda: pai_tracker.dendrites)
sys.modules[__name__].__class__ = _Module
