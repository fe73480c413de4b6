"""The example script: it runs from the command line, and an interrupted run goes on as if nothing
had happened."""

import sys

import pandas as pd
import pytest

pytest.importorskip(
    "tensorboard", reason="the example writes scalars for TensorBoard: pip install 'pilimit[lab]'"
)

from experiments.lab import example  # noqa: E402


def run(out, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["example", "--samples", "128", "--seeds", "1", "--epochs", "3", "--out", str(out)],
    )
    example.main()
    return pd.read_csv(out / "metrics.csv")


@pytest.mark.slow
def test_it_runs_and_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    expected = run(tmp_path / "straight", monkeypatch)
    assert set(expected["arm"]) == {"plain", "operated", "wide"} and expected["step"].max() == 6
    parameters = expected.groupby("arm")["parameters"].agg(["first", "last"])
    assert (
        parameters.loc["operated", "first"]
        < parameters.loc["operated", "last"]
        == parameters.loc["wide", "last"]
    )
    assert (tmp_path / "straight" / "operated_1" / "report.html").exists()

    class Impatient(example.Experiment):
        """Stopped by hand in the middle of the operated run, after its edit."""

        def train_n_steps(self, n):
            if self.name == "operated_1" and self.lab.steps == 4:
                super().train_n_steps(n)
                raise KeyboardInterrupt
            return super().train_n_steps(n)

    with monkeypatch.context() as patch:
        patch.setattr(example, "Experiment", Impatient)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", patch)
    again = run(tmp_path / "stopped", monkeypatch)
    pd.testing.assert_frame_equal(
        again.sort_values(["arm", "step"], ignore_index=True),
        expected.sort_values(["arm", "step"], ignore_index=True),
        check_exact=True,
    )
