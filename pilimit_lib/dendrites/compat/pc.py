"""The settings ``GPA.pc``, as the documented system has them."""

import warnings
from collections.abc import Callable
from typing import Any

from .. import spelling
from ..conversion import PAISequential
from ..decisions.rules import at
from .settings import CONSTANTS, SETTINGS, defaults

LISTS = [
    name
    for name, setting in SETTINGS.items()
    if isinstance(setting.default, list)
    and name not in ("improvement_threshold", "input_dimensions")
]
METHODS = [f"{verb}_{name}" for name in SETTINGS for verb in ("set", "get")] + [
    f"append_{name}" for name in LISTS
]
NAMES = [*METHODS, *CONSTANTS, *SETTINGS, "PAISequential"]


class PAIConfig:
    """Every documented setting with ``set_x``, ``get_x`` and, for lists, ``append_x``; values are
    checked when they are set."""

    def __init__(self):
        object.__setattr__(self, "_values", defaults())
        object.__setattr__(self, "_dendrites", lambda: 0)

    def read_dendrites_from(self, count: Callable[[], int]) -> None:
        """Say how many dendrites the network has now, for settings that are lists over them."""
        object.__setattr__(self, "_dendrites", count)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        meant = name if name in NAMES else self._respelt(name)
        if meant == "PAISequential":
            return PAISequential
        if meant in CONSTANTS:
            return CONSTANTS[meant]
        if meant in SETTINGS:
            return self._get(meant)
        verb, _, setting = meant.partition("_")
        return getattr(self, f"_{verb}er")(setting, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setting = name if name in SETTINGS else self._respelt(name, SETTINGS)
        self._set(setting, value)

    def __dir__(self):
        return [*NAMES, "reset"]

    def reset(self) -> None:
        """Back to the defaults."""
        self._values.clear()
        self._values.update(defaults())

    def values(self) -> dict[str, Any]:
        return dict(self._values)

    def _respelt(self, name: str, known=NAMES) -> str:
        meant = spelling.respell(name, known)
        if meant is None:
            raise spelling.unknown("GPA.pc", name, METHODS)
        spelling.warn_once(f"GPA.pc.{name}", f"GPA.pc.{meant}")
        return meant

    def _set(self, setting: str, value: Any) -> None:
        entry = SETTINGS[setting]
        copied = isinstance(value, list) and setting not in (*LISTS, "input_dimensions")
        checked = entry.check(setting, list(value) if copied else value)
        if entry.inert and checked != entry.default:
            warnings.warn(
                f"GPA.pc.set_{setting} has no effect here: {entry.inert}", UserWarning, stacklevel=4
            )
        self._values[setting] = checked

    def _get(self, setting: str) -> Any:
        value = self._values[setting]
        if setting in LISTS or setting == "input_dimensions" or not isinstance(value, list):
            return value
        return at(value, self._dendrites())

    def _seter(self, setting: str, typed: str):
        def setter(value):
            self._set(setting, value)

        return setter

    def _geter(self, setting: str, typed: str):
        def getter(*value):
            """The setting; for one that is a list over numbers of dendrites, the entry that holds
            now."""
            if len(value) > 1:
                raise TypeError(f"get_{setting} takes no value; use set_{setting}(value)")
            if not value:
                return self._get(setting)
            verb = "append" if setting in LISTS else "set"
            spelling.warn_once(f"GPA.pc.{typed}(value)", f"GPA.pc.{verb}_{setting}(value)")
            return (self._appender if verb == "append" else self._seter)(setting, typed)(value[0])

        return getter

    def _appender(self, setting: str, typed: str):
        def appender(value):
            self._values[setting].extend(SETTINGS[setting].check(setting, value))

        return appender


pc = PAIConfig()
