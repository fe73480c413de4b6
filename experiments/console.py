"""One command for all: pilimit <command>. What it runs is loaded only then, so that its own help is
there at once."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from runpy import run_module

from pilimit_lib import __version__

from .training.called import COMMANDS

OWN = __package__
MEANINGS = {
    "train": "train an infinite-width MLP, or a finite one, on images",
    "conv": "the same for ConvNets",
    "maml": "meta-learn on Omniglot or sinusoids",
    "maml-test": "test what was meta-learned",
    "transfer": "pretrain, and see how the features transfer to CIFAR-10",
    "test": "test a saved network, its feature kernel, or NNGP and NTK; no training",
    "plot": "draw figures from the files of runs",
    "bench": "measure what a training step costs: pilimit bench NAME",
    "report": "write the page about a run of the lab",
    "convert": "convert a checkpoint of the paper's code",
    "doctor": "say what this machine and this installation can do",
}
ELSEWHERE = {
    "report": "pilimit_lib.lab.__main__",
    "convert": "pilimit_orig.convert_net",
    "doctor": f"{OWN}.doctor",
}
NO_BENCHMARK = {"__init__", "machine"}  # modules of the folder that measure nothing


def benchmarks() -> list[str]:
    """What can follow `pilimit bench`."""
    files = (Path(__file__).parent / "bench").glob("*.py")
    return sorted({path.stem for path in files} - NO_BENCHMARK)


def usage() -> str:
    """The text of `pilimit --help`."""
    lines = (f"  {name:10} {meaning}" for name, meaning in MEANINGS.items())
    return "\n".join(
        [
            "usage: pilimit <command> [flags]      pilimit <command> --help lists its flags",
            "",
            "Infinitely wide networks that learn features, and other networks that change shape.",
            "",
            *lines,
            "",
            "  --version  the version of pilimit",
        ]
    )


def fail(sentence: str) -> int:
    print(f"pilimit: error: {sentence}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run the command that was typed; its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"pilimit {__version__}")
        return 0
    if name not in MEANINGS:
        return fail(f"there is no command {name!r}; one of {', '.join(MEANINGS)} was expected")
    module = ELSEWHERE.get(name) or f"{OWN}.{COMMANDS[name]}"
    if name == "bench":
        known = benchmarks()
        if not rest or rest[0] not in known:
            got = f"{rest[0]!r} is none" if rest else "none was given"
            return fail(f"pilimit bench needs a benchmark; {got}: one of {', '.join(known)}")
        module = f"{module}.{rest.pop(0)}"
    if name == "report":
        rest = ["report", *rest]
    return carried_out(module, rest)


def carried_out(module: str, rest: list[str]) -> int:
    """The exit status of the command in a module, whose main may return what it found."""
    if {"-h", "--help"} & set(rest):
        # as a script a command answers this before it loads torch
        sys.argv[1:] = rest
        run_module(module, run_name="__main__")
        return 0
    found = import_module(module).main(rest)
    return found if isinstance(found, int) else 0


if __name__ == "__main__":
    sys.exit(main())
