"""A command line made of the dataclass that holds a command's settings. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")
KINDS = {"int | None": int, "float | None": float, "str | None": str}


def command_line(
    command: str,
    settings: type,
    description: str | None = None,
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    helps: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    positional: str | None = None,
) -> argparse.ArgumentParser:
    """The parser of `python -m experiments.<command>`: one flag per field of `settings`.

    `choices`, `helps` and `aliases` (a second spelling) are by field; the field `positional` is an
    argument without a flag. A field that is False by default is switched on by its flag; one of
    type `bool | None` also has a --no-flag.
    """
    result = plain_command_line(command, description)
    choices, helps, aliases = choices or {}, helps or {}, aliases or {}
    for field in fields(settings):
        how = _action(field, choices.get(field.name), helps.get(field.name))
        if field.name == positional:
            # without a default argparse takes it for typed only where it was
            result.add_argument(field.name, nargs="?", **how | {"default": argparse.SUPPRESS})
        else:
            spellings = [flag_of(field.name), aliases.get(field.name)]
            result.add_argument(*filter(None, spellings), dest=field.name, **how)
    return result


def answer_help(parser: argparse.ArgumentParser) -> None:
    """Print the help and exit where it was asked for: called before torch is imported, which takes
    seconds."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser.print_help()
        parser.exit()


def plain_command_line(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m experiments.<command>`, without a flag."""
    return argparse.ArgumentParser(
        prog=f"python -m experiments.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def flag_of(name: str) -> str:
    """The flag of a field: save_dir -> --save-dir."""
    return f"--{name.replace('_', '-')}"


def _action(field: Field, choices: Sequence[str] | None, text: str | None) -> dict[str, Any]:
    """What argparse shall make of a field."""
    default = field.default
    if default is False:
        return {"action": "store_true", "help": text}
    if str(field.type) == "bool | None":
        return {"action": argparse.BooleanOptionalAction, "default": default, "help": text}
    return {
        "type": KINDS.get(str(field.type)) or type(default),
        "default": default,
        "choices": choices,
        "help": text or f"default {default}",
    }


def add_switches(parser: argparse.ArgumentParser, meanings: Mapping[str, str]) -> None:
    """Flags that switch something on (name without dashes: meaning)."""
    for name, meaning in meanings.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, removed: Mapping[str, str]
) -> argparse.Namespace:
    """The arguments; flags that the original had and we don't are refused with the reason given in
    `removed`."""
    args, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        name = flag.split("=")[0]
        if name in removed:
            parser.error(f"{name} is gone: {removed[name]}; leave it out")
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return args


def typed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, settings: type
) -> dict[str, Any]:
    """The fields of `settings` that stand on a command line which `parse` has accepted."""
    unset = object()
    names = [field.name for field in fields(settings)]
    found, _ = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name: value for name, value in picked(found, names).items() if value is not unset}


def settings_to_run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    args: argparse.Namespace,
    settings: type[Settings],
    known: Path,
) -> Settings:
    """The settings of a command line. With --resume, those in the file `known` count where nothing
    was typed."""
    if not args.resume or not known.is_file():
        return settings_of(args, settings)
    before = read_settings(known)
    names = [field.name for field in fields(settings) if field.name in before]
    kept = {name: before[name] for name in names}
    return settings(**{**kept, **typed(parser, argv, settings)})


def read_settings(path: Path) -> dict[str, Any]:
    """What a run wrote about its settings. Raises ValueError where that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); it holds a run's settings") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a run's settings")
    return found


def settings_of(args: argparse.Namespace, settings: type[Settings]) -> Settings:
    """The settings that were typed."""
    names = [field.name for field in fields(settings)]
    return settings(**picked(args, [name for name in names if name in args]))


def picked(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Arguments under their own names, to be handed on."""
    return {name: getattr(args, name) for name in names}


def milestones(text: str) -> list[int]:
    """Epochs from a comma-separated list such as '40,45'."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"milestones are epochs separated by commas, such as 40,45; got {text!r}"
        ) from None


def too_small(settings: Any, names: Sequence[str], least: int) -> list[str]:
    """What to say about the settings `names` that are less than `least`, 0 or 1."""
    wanted = f"must be at least {least}" if least else "must not be negative"
    return [
        f"{flag_of(name)} {wanted}, got {getattr(settings, name)}"
        for name in names
        if getattr(settings, name) < least
    ]


def require_none(problems: Sequence[str]) -> None:
    """Raise ValueError with all problems, where there are any."""
    if problems:
        raise ValueError("; ".join(problems))


def dated_folder(command: str) -> Path:
    """Where a run goes that was given no folder: output/<command>/<date and time>."""
    return Path("output") / command / time.strftime("%Y-%m-%d_%H-%M-%S")
