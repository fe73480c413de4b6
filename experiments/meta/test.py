"""Test a meta-learned network on tasks of classes that it has never seen.

    python -m experiments.meta.test --config results/config.json
    # with other inner steps than in training
    python -m experiments.meta.test --config results/config.json --num-steps 5
    # no inner steps: the nearest class
    python -m experiments.meta.test --config results/config.json --nilmax

The result is printed and added to test.jsonl beside the config, and to the cox store there if the
run has one.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pilimit_lib.core import load

from ..training.errors import errors_of
from ..training.flags import add_switches, plain_command_line
from ..training.process import pick_device
from .learner import build, evaluate, hold_fixed, tasks
from .settings import Settings
from .stores import require_cox, write_tables

TEST_SEED = 2_000_003  # apart from the seeds of training and validation


def settings_from(config: Path, folder: str | None = None) -> Settings:
    """The settings of the run that wrote `config`; `folder` says where its data are now."""
    if not config.is_file():
        raise FileNotFoundError(
            f"there is no {config}; --config is the config.json that a training run wrote"
        )
    try:
        found = json.loads(config.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{config} is damaged ({error}); it should be the config.json of a training run"
        ) from error
    known = {field.name for field in fields(Settings)}
    if not isinstance(found, dict) or set(found) - known:
        odd = sorted(set(found) - known) if isinstance(found, dict) else [type(found).__name__]
        raise ValueError(
            f"{config} is no config.json of a training run here: it holds {', '.join(odd)}"
        )
    settings = Settings(**found)
    return settings if folder is None else replace(settings, folder=folder)


def test(
    config: str | Path,
    *,
    folder: str | None = None,
    split: str = "test",
    steps: int | None = None,
    batches: int | None = None,
    without_steps: bool = False,
    unrotated: bool = False,
    seed: int | None = None,
    cuda: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """The record of one test, also added to test.jsonl beside the config. `seed` draws other
    tasks; `unrotated`: of characters of the test split as they are, whatever the config says."""
    config = Path(config)
    settings = settings_from(config, folder)
    if unrotated:
        settings = replace(settings, unrotated_test=True)
    settings.check()
    has_cox = (config.parent / "cox").is_dir()
    if has_cox:
        require_cox()
    model = config.parent / "model.th"
    if not model.is_file():
        raise FileNotFoundError(
            f"there is no {model}: the training run that wrote {config} has not finished an epoch"
        )
    device = pick_device(cuda, "--use-cuda")
    net = build(settings, device)
    net.load_state_dict(load(model))
    hold_fixed(settings, net)
    if verbose:
        print(net)
    seed = TEST_SEED if seed is None else seed
    stream = tasks(settings, split, seed, quiet)
    found = evaluate(
        settings,
        net,
        stream,
        batches or settings.num_test_batches,
        device,
        quiet,
        steps,
        without_steps,
    )
    taken = settings.num_steps if steps is None else steps
    record = {
        "split": split,
        "num_steps": 0 if without_steps else taken,
        "nilmax": without_steps,
        "unrotated": split == "test" and settings.unrotated_test,
        "seed": seed,
        **found,
    }
    path = config.parent / "test.jsonl"
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    write_tables(config.parent, {"test": [*earlier, record]}, cox=has_cox)
    return record


def _interval(half: float | None, times: float, digits: int) -> str:
    """± half the width of an interval; nothing of a single task."""
    return "" if half is None else f" ± {times * half:.{digits}f}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = plain_command_line("meta.test", __doc__)
    which = arguments.group("what is tested").add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="config.json of the training run")
    which.add_argument(
        "--output-folder", "--save-dir", default="", help="or the folder that holds it"
    )
    data, steps, output = map(arguments.group, ("data", "schedule", "output"))
    data.add_argument("--folder", help="folder that holds the data (default as in training)")
    data.add_argument(
        "--test_dataset_split",
        "--test-dataset-split",
        choices=("test", "val"),
        default="test",
        help="classes to test on (default test; the paper: test)",
    )
    data.add_argument("--seed", type=int, help="draw other test tasks")
    data.add_argument(
        "--unrotated",
        action="store_true",
        help="test characters as they are, as in the paper, not turned too",
    )
    data.add_argument(
        "--num-workers",
        type=int,
        default=1,
        help="of a torchmeta loader; the sampler here needs none",
    )
    steps.add_argument(
        "--num-steps", type=int, default=-1, help="inner steps (default as in training)"
    )
    steps.add_argument(
        "--num-batches", type=int, default=-1, help="batches of tasks (default as in validation)"
    )
    steps.add_argument(
        "--nilmax", action="store_true", help="no inner steps: classify by the readout's kernel"
    )
    output.add_argument("--use-cuda", "--cuda", action="store_true", help="test on the GPU")
    add_switches(arguments, {"verbose": "print the network", "quiet": "no progress bar"})
    args = arguments.parse_args(argv)
    with errors_of(arguments):
        record = test(
            args.config or Path(args.output_folder) / "config.json",
            folder=args.folder,
            split=args.test_dataset_split,
            steps=None if args.num_steps < 0 else args.num_steps,
            batches=None if args.num_batches < 1 else args.num_batches,
            without_steps=args.nilmax,
            unrotated=args.unrotated,
            seed=args.seed,
            cuda=args.use_cuda,
            quiet=args.quiet,
            verbose=args.verbose,
        )
        accuracy = (
            f"accuracy {100 * record['acc']:.2f}{_interval(record['acc_ci95'], 100, 2)} %, "
            if "acc" in record
            else ""
        )
        print(
            f"{accuracy}loss {record['loss']:.4f}{_interval(record['loss_ci95'], 1, 4)} over "
            f"{record['tasks']} tasks of the {record['split']} split (95 % interval)"
        )
    return record


if __name__ == "__main__":
    main()
