"""Every command explains itself: a line of help for every flag, errors of one sentence, the same
names for the same things."""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("experiments", "pilimit_orig", "pilimit_lib/lab")
NEEDS = {
    "experiments.dendrites.lightning_digits": "lightning",
    "experiments.dendrites.hf_transformer": "transformers",
}
TRAINING = {
    f"experiments.{name}"
    for name in (
        "cifar10.cifar10mlp",
        "cifar10.cifar10conv",
        "cifar10.cifar10test",
        "imagenet.transfer_imagenet",
        "meta.train",
        "sigprop.cifar10",
        "sigprop.ex2_input_target_max_rand",
        "sigprop.ex4_input_target_topk",
    )
}


def commands() -> list[str]:
    """The modules that can be run and read a command line."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            reads = re.search(r"add_argument|parse_args|parser\(|from .cli import main", text)
            if '__name__ == "__main__"' in text and reads:
                found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


class Caught(Exception):
    """A parser, on its way out of a command."""


def parser_of(module: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser with which a command begins to read its command line."""
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])

    def catch(parser, *arguments, **named):
        raise Caught(parser)

    monkeypatch.setattr(sys, "argv", [module])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
    path, package = (ROOT / module.replace(".", "/")).with_suffix(".py"), module.rpartition(".")[0]
    import_module(package)
    names = {"__name__": "__main__", "__package__": package, "__file__": str(path)}
    with pytest.raises(Caught) as caught:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return caught.value.args[0]


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """What can be typed, that of subcommands too."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for sub in action.choices.values() for inner in actions(sub)]
        else:
            found.append(action)
    return found


def silent(parser: argparse.ArgumentParser) -> list[str]:
    """Flags that say nothing but their default."""
    return [
        action.dest
        for action in actions(parser)
        if not re.sub(r"\(?default.*", "", action.help or "").strip()
    ]


@pytest.mark.parametrize("module", commands())
def test_every_flag_says_what_it_does(module, monkeypatch):
    parser = parser_of(module, monkeypatch)
    assert silent(parser) == []
    assert parser.format_help()


@pytest.mark.parametrize("module", commands())
def test_flags_of_output_folders_have_the_same_name(module, monkeypatch):
    parser = parser_of(module, monkeypatch)
    flags = {flag for action in actions(parser) for flag in action.option_strings}
    folders = [a for a in actions(parser) if a.dest == "out" and a.help.startswith("folder")]
    wanted = {"--save-dir"} if folders or module in TRAINING else set()
    if module in TRAINING:
        wanted |= {"--overwrite", "--cuda"}
    assert flags >= wanted


def test_the_commands_are_found():
    assert set(commands()) >= TRAINING | {"experiments.bench.rows", "pilimit_orig.convert_net"}


def test_a_silent_flag_would_be_found():
    parser = argparse.ArgumentParser()
    parser.add_argument("--r", help="default 5")
    parser.add_argument("--out")
    assert silent(parser) == ["r", "out"]


def test_flags_stand_in_groups_with_the_papers_values(monkeypatch):
    parser = parser_of("experiments.cifar10.cifar10mlp", monkeypatch)
    text = parser.format_help()
    titles = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert titles[-6:] == ["data", "network", "memory", "optimiser", "schedule", "output"]
    assert "the paper: 200 and 400" in " ".join(text.split())
    assert len(text.split("\n\n")[0].splitlines()) == 1, "the usage repeats the flags"


def test_an_error_is_one_sentence(capsys):
    from experiments.cifar10.cifar10mlp import main

    with pytest.raises(SystemExit) as stopped:
        main(["--epochs", "many"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1 and "--epochs" in said and "--help" in said


def test_spellings_of_the_original_and_common_ones_mean_the_same():
    from experiments.imagenet import settings as transfer
    from experiments.meta.settings import parser as meta

    args = meta().parse_args(["--save-dir", "there", "--overwrite", "--cuda"])
    assert (args.output_folder, args.overwrite_existing, args.use_cuda) == ("there", True, True)
    assert transfer.ALIASES == {"transfer_milestones": ("--transfer-milestone",)}
    from experiments.cifar10.settings import parser

    of_transfer = parser(None, transfer.Settings, texts=transfer.TEXTS, aliases=transfer.ALIASES)
    assert of_transfer.parse_args(["--transfer-milestone=0"]).transfer_milestones == "0"


def test_a_run_says_what_it_trains_and_warns_where_no_data_set_was_named(tmp_path, capsys):
    from experiments.cifar10.cifar10mlp import main

    few = ["--train-subset-size", "16", "--test-subset-size", "16", "--epochs", "1", "--r", "4"]
    main([*few, "--save-dir", str(tmp_path / "a")])
    said, loud = capsys.readouterr()
    assert "TRAINS ON DIGITS" in loud and "--dataset cifar10" in loud
    about, header, row = said.splitlines()[:3]
    assert "infinite" in about and "parameters" in about and "CPU" in about
    assert "16 training and 16 test images of 1 x 8 x 8" in about
    assert header.split()[0] == "epoch" and re.search(r"\d [kM]?B ", row)
    main([*few, "--dataset", "digits", "--save-dir", str(tmp_path / "b")])
    assert "TRAINS ON" not in capsys.readouterr().err
