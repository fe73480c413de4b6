"""A command line made of the dataclass that holds a command's settings. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .called import called
from .flag_texts import COMMON, GROUPS

Settings = TypeVar("Settings")
KINDS = {"int | None": int, "float | None": float, "str | None": str}
METAVARS = {int: "N", float: "X"}  # how --help shows a value


class CommandLine(argparse.ArgumentParser):
    """The parser of a command: flags in groups, and an error that is one sentence."""

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The group of this title; those of GROUPS are shown in that order."""
        found = {group.title: group for group in self._action_groups}
        return found.get(title) or self.add_argument_group(title)

    def format_help(self) -> str:
        """Help without the list of all flags before it: the groups are that list."""
        self._action_groups.sort(key=lambda group: group.title == "output")
        named = [action for action in self._actions if not action.option_strings]
        shown = (f" [{a.dest}]" if a.nargs == "?" else f" {a.dest}" for a in named)
        self.usage = f"%(prog)s{''.join(shown)} [flags]"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """End with status 2. The usage, of sixty flags, would hide the sentence."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def command_line(
    command: str,
    settings: type,
    description: str | None = None,
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    texts: Mapping[str, Mapping[str, str]] | None = None,
    paper: Mapping[str, str] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    positional: str | None = None,
) -> CommandLine:
    """The parser of `python -m experiments.<command>`: one flag per field of `settings`.

    `texts` says by group and field what a flag means, where that is not what it means in every
    command (`flag_texts.COMMON`). `choices`, `paper` (the value of the paper's runs) and `aliases`
    (further spellings) are by field; the field `positional` is an argument without a flag. A field
    that is False by default is switched on by its flag; one of type `bool | None` also has a
    --no-flag.
    """
    result = plain_command_line(command, description)
    choices, paper, aliases = choices or {}, paper or {}, aliases or {}
    for field in fields(settings):
        title, text = _meaning(field.name, texts or {})
        how = _action(field, choices.get(field.name), text, paper.get(field.name))
        if field.name == positional:
            # without a default argparse takes it for typed only where it was
            how |= {"default": argparse.SUPPRESS}
            result.group(title).add_argument(field.name, nargs="?", **how | {"metavar": None})
        else:
            spellings = (flag_of(field.name), *aliases.get(field.name, ()))
            result.group(title).add_argument(*spellings, dest=field.name, **how)
    return result


def answer_help(parser: argparse.ArgumentParser) -> None:
    """Print the help and exit where it was asked for: called before torch is imported, which takes
    seconds."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser.print_help()
        parser.exit()


def plain_command_line(command: str, description: str | None) -> CommandLine:
    """The parser of `python -m experiments.<command>`, without a flag."""
    written = f"python -m experiments.{command}"
    result = CommandLine(
        prog=called(command),
        description=description and description.replace(written, called(command)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title in GROUPS:
        result.group(title)
    return result


def flag_of(name: str) -> str:
    """The flag of a field: save_dir -> --save-dir."""
    return f"--{name.replace('_', '-')}"


def _meaning(name: str, texts: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    """(group, text) of a field: as its command says, or as all do."""
    for table in (texts, COMMON):
        for title, meanings in table.items():
            if name in meanings:
                return title, meanings[name]
    return "other", ""


def _action(
    field: Field, choices: Sequence[str] | None, text: str, paper: str | None
) -> dict[str, Any]:
    """What argparse shall make of a field."""
    default = field.default
    silent = default is None or default is False or default == ""
    known = [] if silent else [f"default {default}"]
    known += [f"the paper: {paper}"] if paper else []
    text = f"{text} ({'; '.join(known)})" if known else text
    if default is False:
        return {"action": "store_true", "help": text}
    if str(field.type) == "bool | None":
        return {"action": argparse.BooleanOptionalAction, "default": default, "help": text}
    kind = KINDS.get(str(field.type)) or type(default)
    return {
        "type": kind,
        "metavar": None if choices else METAVARS.get(kind, field.name.split("_")[-1].upper()),
        "default": default,
        "choices": choices,
        "help": text,
    }


def add_switches(parser: CommandLine, meanings: Mapping[str, str], group: str = "output") -> None:
    """Flags that switch something on (name without dashes: meaning)."""
    for name, meaning in meanings.items():
        parser.group(group).add_argument(f"--{name}", action="store_true", help=meaning)


def add_save_dir(parser: CommandLine, folder: str, *spellings: str) -> None:
    """The flag of the output folder, --save-dir, beside the command's own `spellings`."""
    parser.group("output").add_argument(
        *(spellings or ("--save-dir",)),
        *(("--save-dir",) if spellings else ()),
        default="",
        help=f"output folder (default output/{folder}/<date and time>)",
    )


def add_log(parser: CommandLine) -> None:
    """The flag of logs outside of this library."""
    parser.group("output").add_argument(
        "--log",
        action="append",
        default=[],
        choices=("tensorboard", "wandb"),
        help="also log every epoch there (pip install 'pilimit[tensorboard]' or 'pilimit[wandb]'); "
        "may be given twice",
    )


def add_out(parser: CommandLine, default: str | None, meaning: str) -> None:
    """The flag of the output folder of a command that measures, --out or --save-dir."""
    parser.group("output").add_argument(
        "--out",
        "--save-dir",
        type=Path,
        required=default is None,
        default=default and Path(default),
        help=f"{meaning} (default {default})" if default else meaning,
    )


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
