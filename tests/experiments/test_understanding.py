"""The commands of experiments.understanding on tiny settings: what they write, and what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pandas as pd
import pytest

from experiments.training.images import load_images
from experiments.understanding import attribution, digits_run, forgetting, lazy_or_rich, scaling

TINY = ["--quiet", "--train-subset-size", "64", "--test-subset-size", "32", "--r", "6"]


@pytest.mark.parametrize(
    "kind",
    ["moments", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rows", "finite"))],
)
def test_lazy_or_rich_trains_keeps_and_draws(kind, tmp_path, capsys):
    flags = {"rows": [], "moments": ["--memory", "moments"], "finite": ["--width", "16"]}[kind]
    folder = ["--save-dir", str(tmp_path), "--samples", "16", "--ntk-samples", "4"]
    frame = lazy_or_rich.main([*TINY, "--epochs", "2", *flags, *folder])
    assert sorted(p.name for p in tmp_path.glob("model_epoch_*")) == [
        f"model_epoch_{n}.th" for n in (0, 1, 2)
    ]
    assert set(frame["kernel"]) == {"layers.1", "layers.2", "layers.3", "NTK"}
    first, last = (frame[frame["epoch"] == epoch]["change"] for epoch in (0, 2))
    assert (first == 0).all() and (last > 0.01).all()
    assert (tmp_path / "lazy_or_rich.png").stat().st_size > 10_000
    again = lazy_or_rich.main(["--draw-only", *folder])
    pd.testing.assert_frame_equal(again, frame)
    assert "layers.3" in capsys.readouterr().out
    (tmp_path / "model_epoch_0.th").unlink()
    (tmp_path / "model_epoch_1.th").unlink()
    with pytest.raises(SystemExit):
        lazy_or_rich.main(["--draw-only", *folder])
    assert "holds 1 networks" in capsys.readouterr().err


@dataclass(frozen=True)
class Short(digits_run.Run):
    samples: int = 20
    r: int = 4
    epochs: int = 1


@pytest.fixture
def short(monkeypatch):
    for module in (attribution, forgetting):
        monkeypatch.setattr(module, "Run", Short)


def test_forgetting_compares_three_ways(short, tmp_path):
    frame = forgetting.main(["--save-dir", str(tmp_path), "--seeds", "2", "--forget", "3"])
    assert len(frame) == 2 and (frame["moved by retraining"] > 0).all()
    assert (frame["untouched, from retrained"] == frame["moved by retraining"]).all()
    again = forgetting.main(["--save-dir", str(tmp_path), "--seeds", "2", "--forget", "3"])
    pd.testing.assert_frame_equal(frame, again)  # from the runs' own files


def test_attribution_goes_on_with_what_is_missing(short, tmp_path, monkeypatch):
    flags = ["--save-dir", str(tmp_path), "--seeds", "1", "--subsets", "3", "--queries", "4"]
    frame = attribution.main(flags)
    assert set(frame["method"]) == set(attribution.METHODS)
    assert set(frame["left out"]) == set(attribution.FRACTIONS)
    assert (tmp_path / "attribution.png").stat().st_size > 10_000
    suspects = pd.read_csv(tmp_path / "mislabelled.csv")
    assert len(suspects) == 5 and suspects["AUC"].between(0, 1).all()
    monkeypatch.setattr(attribution, "replay_subsets", None)  # nothing is trained again
    pd.testing.assert_frame_equal(attribution.main(flags), frame)


def test_wrong_labels_are_wrong_and_the_others_are_not():
    run = digits_run.Run(samples=50, flipped=0.1)
    x, y, wrong = digits_run.data_of(run, seed=3)
    clean = digits_run.data_of(digits_run.Run(samples=50), seed=3)[1]
    assert wrong.sum() == 5 and ((y != clean) == wrong).all() and x.shape == (50, 64)


@pytest.mark.slow
def test_scaling_names_what_does_not_scale(tmp_path, capsys):
    settings = scaling.Settings(
        r=6,
        images=64,
        steps=4,
        widths=(64, 512),
        rates=(0.5, 1.0),
        seeds=(0, 1),
        check_seeds=(0, 1),
        check_steps=2,
    )
    off = scaling.main(["--save-dir", str(tmp_path)], settings)
    assert "layers.2" in off["standard"] and "layers.1" in off["NTK"] and not off["π"]
    for name in ("coord_check.png", "rates.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    frame = pd.read_csv(tmp_path / "rates.csv")
    assert len(frame) == 2 * 2 * (1 + 3 * 2)
    assert "best at infinity" in capsys.readouterr().out


def test_powers_agree_at_the_base_width():
    data = load_images("digits")
    for kind in scaling.POWERS:
        net = scaling.finite(scaling.limit_of(scaling.Settings(r=4), data, 0), kind, scaling.BASE)
        rates = [group["lr"] for group in scaling.optimizer_of(net, kind, 1.0).param_groups]
        assert rates == [0.1, 1.0, 4.0], kind
    assert json.dumps(scaling.POWERS["standard"]) == "[-1, 0, 1]"
