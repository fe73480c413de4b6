"""The examples run, and an interrupted one goes on as if it had not been."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.dendrites import (
    does_it_help,
    growing_networks,
    help_figure,
    images,
    sequences,
    starts,
)
from experiments.dendrites.data import digits, fashion
from pilimit_lib.dendrites import GPA, DendriteConfig, dendritic, dendritic_layers


def test_an_interrupted_arm_ends_like_an_uninterrupted_one(tmp_path):
    settings = images.Settings(patience=1, scheduler_patience=0)
    sets = {name: (x[:200], y[:200]) for name, (x, y) in digits().items()}
    whole = images.fit("dendrites", 0.125, 3, sets, settings, tmp_path / "whole", 6)
    images.fit("dendrites", 0.125, 3, sets, settings, tmp_path / "cut", 4)
    rest = images.fit("dendrites", 0.125, 3, sets, settings, tmp_path / "cut", 6)
    same = [key for key in whole if key not in ("seconds", "bookkeeping", "wall")]
    assert {key: whole[key] for key in same} == {key: rest[key] for key in same} and whole[
        "parameters trained"
    ] > whole["parameters at start"]


@pytest.mark.slow
def test_the_command_writes_its_table_and_does_not_repeat_what_is_done(tmp_path):
    args = [
        "--max-epochs",
        "3",
        "--patience",
        "1",
        "--scheduler-patience",
        "0",
        "--seeds",
        "0",
        "--out",
        str(tmp_path),
    ]
    images.main(args)
    rows = (tmp_path / "results.jsonl").read_text()
    assert [json.loads(line)["arm"] for line in rows.splitlines()] == [
        "dendrites",
        "restarts",
        "wider",
    ]
    assert (
        "minus restarts" in (tmp_path / "table.md").read_text()
        and (tmp_path / "test.png").stat().st_size > 0
    )
    images.main(args)
    assert (tmp_path / "results.jsonl").read_text() == rows


@pytest.mark.slow
def test_the_gru_example_runs(tmp_path):
    GPA.pc.reset()
    sequences.main(["--epochs", "2", "--out", str(tmp_path / "gru")])
    assert (tmp_path / "gru" / "grubestTestScores.csv").is_file()
    GPA.pc.reset()


def test_the_parameter_matched_width_is_the_nearest():
    for width in (0.25, 0.5, 1.0):
        count = images.parameters(images.ConvNet(width, 8))
        assert images.parameters(images.ConvNet(images.width_for(count, 8), 8)) == count


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="train-images-idx3-ubyte .or .gz. is not there; give --data"
    ):
        fashion(str(tmp_path), 10, 10)


SHAPES = {"digits": (9, 1, 8, 8), "fashion": (9, 1, 28, 28), "resnet": (9, 1, 28, 28)}


@pytest.mark.parametrize("kind", SHAPES)
def test_width_grows_without_changing_the_function_and_by_as_much_as_dendrites(kind):
    torch.manual_seed(0)
    given = does_it_help.KINDS[kind]
    net, x = given.network(4), torch.randn(SHAPES[kind])
    net(x)  # running statistics of their own
    wider = given.widened(net, growing_networks.size_of_a_generation(given, 4))
    for training in (True, False):
        torch.testing.assert_close(wider.train(training)(x), net.train(training)(x))
    config = DendriteConfig(convert=[f".{name}" for name in given.grows])
    dendritic(net, config)
    net(x)
    for _, layer in dendritic_layers(net):
        layer.grow(torch.Generator().manual_seed(0))
    unit = growing_networks.unit_cost(given)
    count = growing_networks.parameters(net)
    assert abs(growing_networks.parameters(wider) - count) <= unit / 2
    nearest = growing_networks.units_for(given, count)
    assert abs(growing_networks.parameters(given.network(nearest)) - count) <= unit / 2


def test_the_comparison_of_all_arms_is_resumed_and_repeats_nothing(tmp_path):
    arguments = ["--hidden", "2", "--max-epochs", "4", "--patience", "1", "--out", str(tmp_path)]
    does_it_help.main([*arguments, "--seeds", "0", "--arms", "dendrites", "width"])
    begun = (tmp_path / "results.csv").read_text()
    does_it_help.main([*arguments, "--seeds", "0"])
    rows = (tmp_path / "results.csv").read_text()
    assert rows.startswith(begun) and rows.count("\n") == 1 + len(does_it_help.ARMS)
    does_it_help.main([*arguments, "--seeds", "0"])
    assert (tmp_path / "results.csv").read_text() == rows


def test_the_look_at_starts_tells_them_apart(tmp_path):
    arguments = ["--hidden", "3", "--seeds", "0", "--epochs", "6", "--more", "1"]
    frame = starts.main([*arguments, "--out", str(tmp_path)]).set_index("way")
    assert tuple(frame.index) == starts.WAYS
    best, drawn = frame.loc["gradient"], frame.loc["standardised"]
    assert best["explained, hidden"] > 3 * drawn["explained, hidden"] >= 0
    assert frame.loc["none", ["explained, hidden"]].isna().all()
    # the share that a second least squares explains, by numpy
    g = torch.Generator().manual_seed(0)
    x, e, a = (torch.randn(40, k, generator=g) for k in (3, 2, 2))
    gained = 0.0
    for i in range(2):
        fits = []
        for columns in ([x], [x, a[:, i : i + 1]]):
            design = torch.cat([*columns, torch.ones(40, 1)], 1).double().numpy()
            error = e[:, i].double().numpy()
            fits.append(((error - design @ np.linalg.lstsq(design, error)[0]) ** 2).sum())
        gained += fits[0] - fits[1]
    total = float((e.double() - e.double().mean(0)).square().sum())
    assert starts.explained(x, e, a) == pytest.approx(gained / total, rel=1e-6)


def test_the_table_pairs_seeds_and_leaves_out_what_is_unfinished(tmp_path):
    rows = [
        {"hidden": 4, "seed": seed, "arm": arm, "val": 0.0, "test": 10.0 * i + seed}
        | {"parameters": 100, "epochs": 5}
        for seed in range(3)
        for i, arm in enumerate(does_it_help.ARMS)
    ]
    file = tmp_path / "help_fashion.csv"
    pd.DataFrame(rows[:-1]).to_csv(file, index=False)  # the last arm of seed 2 is missing
    help_figure.main([str(file), "--out", str(tmp_path)])
    text = (tmp_path / "help.md").read_text()
    assert (
        "| fashion, 4 | dendrites | 0.5 ± 0.7 | -30.0 ± 0.0 | 0/2 | -40.0 ± 0.0 | 0/2 | 100 |"
        in (text)
    )
    assert (
        "| fashion, 4 | wide | 50.5 ± 0.7 | +20.0 ± 0.0 | 2/2 | +10.0 ± 0.0 | 2/2 | 100 |" in text
    )
    assert (tmp_path / "help.png").stat().st_size > 0
