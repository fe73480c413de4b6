"""Which sums a training command runs with, torch's own or those in C++: decided once, before the
first step, and written into its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pilimit_lib.inf import implementation
from pilimit_lib.inf.implementation import Implementation, chosen
from pilimit_lib.inf.moments import native as native_moments
from pilimit_lib.inf.rows.sums import native as native_rows

from .flags import read_settings

UNAVAILABLE = {"rows": native_rows.unavailable, "moments": native_moments.unavailable}


def decided(
    asked: str,
    kinds: Sequence[str],
    refused: str | None,
    before: str | None = None,
) -> tuple[str, str]:
    """(`native` or `plain`, for a network made of `kinds` of sums ("rows", "moments"); what to say
    about it, if anything).

    `asked` may also be `auto`: what a resumed run had `before`, else native where that can be
    built, which is done here; a `with implementation(...)` around
    the run keeps its say. `refused`: why this run can't have it whatever the machine. Raises
    ValueError where native was asked for and can't be had.
    """
    found, line = "plain", ""
    left_alone = before == "plain" or any(_is_chosen(kind) for kind in kinds)
    if kinds and asked != "plain" and not (asked == "auto" and left_alone):
        reasons = [refused] if refused else (UNAVAILABLE[kind]() for kind in kinds)
        reason = next(filter(None, reasons), None)
        if reason is not None and asked == "native":
            raise ValueError(
                f"--implementation native can't run here: {reason}; plain sums in torch"
            )
        found = "native" if reason is None else "plain"
        line = "sums in C++" if reason is None else f"sums in torch, not in C++: {reason}"
    if before not in (None, found):
        line = (
            f"{line or 'sums in torch'}; the run was begun with --implementation {before} and goes "
            f"on with {found}: equal up to rounding, not bit for bit"
        )
    return found, line


def _is_chosen(kind: str) -> bool:
    return getattr(chosen(), kind) != getattr(Implementation(), kind)


def begun_with(settings: Path) -> str | None:
    """The implementation of the run that wrote this file: plain, where it knew no other; None where
    there is no run."""
    return read_settings(settings).get("implementation", "plain") if settings.is_file() else None


@contextmanager
def sums(name: str, kinds: Sequence[str]) -> Iterator[None]:
    """Inside, networks made of `kinds` of sums use the implementation `name`."""
    with implementation(**(dict.fromkeys(kinds, "native") if name == "native" else {})):
        yield
