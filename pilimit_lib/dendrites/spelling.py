"""Names as people type them: camelCase and old spellings lead to the right one, with one warning
each; unknown ones to a suggestion."""

import difflib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

OLD = {
    "pbsequential": "PAISequential",
    "multioutputprocesser": "MultiOutputProcessor",
    "initialize_pb": "initialize_pai",
    "pb_tracker": "pai_tracker",
    "load_pai_system": "load_system",
}
_warned: set[str] = set()


def snake(name: str) -> str:
    """moduleIDsToTrack -> module_ids_to_track, set_dendrite_improvement_thresholdRaw ->
    set_dendrite_improvement_threshold_raw."""
    name = re.sub(r"(IDs|PAI|PB)(?=[A-Z]|$)", lambda m: m.group().capitalize(), name)
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def respell(name: str, known: Iterable[str]) -> str | None:
    """The known name that a different spelling stands for, or None."""
    flat = {k.lower().replace("_", ""): k for k in known}
    for candidate in (OLD.get(name.lower(), name), OLD.get(snake(name), name), snake(name)):
        found = flat.get(candidate.lower().replace("_", ""))
        if found is not None:
            return found
    return None


def warn_once(typed: str, meant: str) -> None:
    """Say the right name the first time that another spelling is used."""
    if typed not in _warned:
        _warned.add(typed)
        warnings.warn(
            f"{typed} is taken as {meant}; use that name", DeprecationWarning, stacklevel=4
        )


def unknown(owner: str, name: str, known: Iterable[str]) -> AttributeError:
    near = difflib.get_close_matches(
        name, list(known), n=3, cutoff=0.5
    ) or difflib.get_close_matches(snake(name), list(known), n=3, cutoff=0.4)
    return AttributeError(
        f"{owner} has no '{name}'"
        + (f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "")
    )


def reader(owner: str, known: Iterable[str], namespace: dict) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that understands other spellings of its public names."""

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        meant = respell(name, known)
        if meant is None:
            raise unknown(owner, name, known)
        warn_once(f"{owner}.{name}", f"{owner}.{meant}")
        return namespace[meant]

    return __getattr__
