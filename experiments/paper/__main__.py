"""The paper's figures, each by one command.

    # the named runs
    python -m experiments.paper list
    # train one, or go on with it, through the ordinary command; DIR holds cifar-10-batches-py
    python -m experiments.paper cifar10-pi-r200 --seed 0 --data DIR
    # what it would take
    python -m experiments.paper cifar10-pi-r200 --data DIR --only-cost
    # copy what the runs have logged to experiments/paper/logs, and make the page from these
    python -m experiments.paper collect
    python -m experiments.paper table

Before a run starts, its settings, their source and its cost are printed. Ctrl-C stops it; the same
command goes on from there. Moments are summed by the native implementation where it can run.
"""

from __future__ import annotations

from pathlib import Path

from pilimit_lib.inf import implementation

from ..training.errors import errors_of
from ..training.flags import plain_command_line
from .commands import COMMANDS, settings_of_run
from .cost import cost_of
from .logs import LOGS, collect, command_line_of, folder_of, log_of_folder
from .runs import RUNS, Run
from .table import PAGE, write_page

OTHERS = {
    "list": "name the runs",
    "collect": "copy the logs of the runs in --output to --logs",
    "table": "make the page from --logs",
}


def listing() -> str:
    """One line per run: name, what it is, its section, the published figure."""
    width = max(map(len, RUNS))
    return "\n".join(
        f"{run.name:{width}}  {run.section}: {run.what}"
        + (f" (published {run.published:.2f} %)" if run.published else "")
        for run in RUNS.values()
    )


def start(run: Run, seed: int, data: str, output: Path, only_cost: bool = False) -> None:
    """Say what the run is and what it costs, and make it or go on with it."""
    settings_of_run(run)
    command, folder = COMMANDS[run.command], folder_of(output, run, seed)
    print(f"{run.name}: {run.section}, {run.what}; settings from {run.source}")
    print(command_line_of(run, seed))
    log = log_of_folder(output, run, seed)
    if log is not None and log.finished and not only_cost:
        print(f"{folder} holds it: {log.state}")
        return
    with implementation(moments="native"):
        cost = cost_of(run, seed, data)
        print(f"cost: {cost or 'said by the command, which reads its data first'}", flush=True)
        if not only_cost:
            command.call(command.argv(run, seed, data, folder), folder)


def main(argv: list[str] | None = None) -> None:
    arguments = plain_command_line("paper", __doc__)
    names = {**dict.fromkeys(RUNS, "a named run"), **OTHERS}
    arguments.add_argument(
        "name",
        metavar="NAME",
        help="a named run, or " + ", ".join(f"{n}: {OTHERS[n]}" for n in OTHERS),
    )
    arguments.add_argument("--seed", type=int, default=0, help="of the run (default 0)")
    arguments.add_argument("--data", default="./dataset", help="folder of the data set")
    arguments.add_argument(
        "--output",
        default="output/paper",
        help="folder of the runs' folders (default output/paper)",
    )
    arguments.add_argument("--logs", default=str(LOGS), help="folder of the CSV files")
    arguments.add_argument("--page", default=str(PAGE), help="page that `table` writes into")
    arguments.add_argument("--only-cost", action="store_true", help="say the cost, run nothing")
    args = arguments.parse_args(argv)
    if args.name not in names:
        arguments.error(f"there is no run {args.name!r}; `list` names them")
    with errors_of(arguments):
        if args.name == "list":
            print(listing())
        elif args.name == "collect":
            for path in collect(Path(args.output), Path(args.logs)):
                print(path)
        elif args.name == "table":
            write_page(Path(args.logs), Path(args.page))
            print(args.page)
        else:
            start(RUNS[args.name], args.seed, args.data, Path(args.output), args.only_cost)


if __name__ == "__main__":
    main()
