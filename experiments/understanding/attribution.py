"""Attributions that shall predict retraining: which of them do, and which find mislabelled samples.

    # a few minutes of one core
    python -m experiments.understanding.attribution --save-dir output/attribution

Trains π-networks of rows on 200 digits, attributes the loss on test images to training samples from
the files of each run, and trains again without random subsets: the linear datamodelling score is
the rank correlation between what was predicted and what came out. Then a tenth of the labels is
flipped, and samples that raise the loss on clean images are suspects. Writes the runs, scores.csv,
mislabelled.csv and attribution.png; begun again, it goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from pilimit_lib.core import load, save, write_text
from pilimit_lib.inf import InfMLP
from pilimit_lib.inf.instruments import empirical_ntk
from pilimit_lib.inf.replay import cross_entropy_each, influence, replay_subsets
from pilimit_lib.inf.replay.scores import auc, linear_datamodelling_score, random_subsets
from pilimit_lib.lab.provenance import Provenance

from ..training.flags import add_out, plain_command_line
from ..training.images import load_images
from .digits_run import Run, Trained, trained

FRACTIONS = (0.01, 0.1, 0.5)
METHODS = ("derivative through training", "row contributions", "TracIn", "gradient dot")


def through_training(run: Trained, x: Tensor, y: Tensor) -> Tensor:
    """[n q]: the predicted change of each query's loss if a sample is left out."""
    return influence(run.record, run.net, run.x, run.y, x, y).values


def slope(net: InfMLP, x: Tensor, y: Tensor) -> Tensor:
    """∂ loss / ∂ outputs [q o]."""
    with torch.no_grad():
        return (net(x).softmax(1) - F.one_hot(y, 10)).double()


def gradient_dot(net: InfMLP, run: Trained, x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the gradients of a sample's and a query's loss [n q], through the tangent
    kernel: rows have no other gradient."""
    theta = empirical_ntk(net, run.x, x, outputs="full")
    return torch.einsum("no,nqop,qp->nq", slope(net, run.x, run.y), theta, slope(net, x, y))


def tracin(run: Trained, x: Tensor, y: Tensor) -> Tensor:
    """The sum of gradient dots over the networks after each epoch."""
    return sum(gradient_dot(net, run, x, y) for net in run.checkpoints)


def row_contributions(run: Trained, x: Tensor, y: Tensor) -> Tensor:
    """What a sample's rows of the readout add to the outputs, times minus the slope of the loss."""
    found = Provenance(run.net).contributions(x)
    values = torch.zeros(len(run.x), len(x), dtype=torch.float64)
    known = found.ids >= 0
    parts = found.values[known].double().detach()
    values[found.ids[known]] = -torch.einsum("sqo,qo->sq", parts, slope(run.net, x, y))
    return values


ATTRIBUTIONS: dict[str, Callable[[Trained, Tensor, Tensor], Tensor]] = {
    METHODS[0]: through_training,
    METHODS[1]: row_contributions,
    METHODS[2]: tracin,
    METHODS[3]: lambda run, x, y: gradient_dot(run.net, run, x, y),
}


def retrained_queries(run: Trained, subsets: Tensor, x: Tensor, y: Tensor, path: Path) -> Tensor:
    """The queries' losses [k q] after training without each of `subsets` [k n]; kept at `path`."""
    if not path.exists():
        outputs = replay_subsets(run.record, run.net, run.x, run.y, subsets, x)
        save(torch.stack([cross_entropy_each(out, y) for out in outputs]), path)
    return load(path)


def scores_of(how: Run, seed: int, count: int, queries: int, folder: Path) -> list[dict]:
    """The score of each method at each fraction left out."""
    run = trained(how, seed, folder)
    images = load_images("digits")
    x, y = images.test_x[:queries].flatten(1), images.test_y[:queries]
    values = {name: method(run, x, y) for name, method in ATTRIBUTIONS.items()}
    rows = []
    for number, fraction in enumerate(FRACTIONS):
        subsets = random_subsets(len(run.x), fraction, count, seed=100 * seed + number)
        path = folder / f"retrained_{fraction:g}.pt"
        outcome = retrained_queries(run, subsets, x, y, path)
        for name, attributed in values.items():
            score = float(linear_datamodelling_score(attributed, subsets, outcome).mean())
            rows.append({"seed": seed, "method": name, "left out": fraction, "LDS": score})
    return rows


def suspects_of(how: Run, seed: int, queries: int, folder: Path) -> list[dict]:
    """How well each method finds flipped labels, beside the loss at the end of training."""
    run = trained(replace(how, flipped=0.1), seed, folder)
    images = load_images("digits")
    x, y = images.test_x[:queries].flatten(1), images.test_y[:queries]
    found = {name: -method(run, x, y).mean(1) for name, method in ATTRIBUTIONS.items()}
    with torch.no_grad():
        found["loss of the sample"] = cross_entropy_each(run.net(run.x), run.y)
    return [
        {"seed": seed, "method": name, "AUC": auc(score, run.wrong)}
        for name, score in found.items()
    ]


def draw(scores: pd.DataFrame, suspects: pd.DataFrame, path: Path) -> None:
    import seaborn as sns
    from matplotlib.figure import Figure

    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        shown = scores.assign(**{"left out": [f"{100 * f:g} %" for f in scores["left out"]]})
        sns.barplot(shown, x="left out", y="LDS", hue="method", errorbar=("sd", 1), ax=left)
        left.set(xlabel="training samples left out", ylabel="linear datamodelling score")
        left.legend(title=None, fontsize=8)
        sns.barplot(suspects, y="method", x="AUC", errorbar=("sd", 1), color="0.6", ax=right)
        right.axvline(0.5, color="0.3", linestyle=":")
        right.set(xlim=(0, 1.02), ylabel=None, xlabel="AUC of finding flipped labels (chance: 0.5)")
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    parser = plain_command_line("understanding.attribution", __doc__)
    add_out(parser, "output/attribution", "folder of tables and figures")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs (default 3)")
    parser.add_argument("--subsets", type=int, default=30, help="for each fraction left out")
    parser.add_argument("--queries", type=int, default=40, help="test images")
    parser.add_argument("--lr", type=float, default=Run.lr, help="of the runs")
    args = parser.parse_args(argv)
    how = replace(Run(), lr=args.lr)
    scores, suspects = [], []
    for seed in range(args.seeds):
        scores += scores_of(how, seed, args.subsets, args.queries, args.out / f"seed_{seed}")
        suspects += suspects_of(how, seed, args.queries, args.out / f"flipped_{seed}")
    frame, found = pd.DataFrame(scores), pd.DataFrame(suspects)
    write_text(args.out / "scores.csv", frame.to_csv(index=False, float_format="%.5g"))
    write_text(args.out / "mislabelled.csv", found.to_csv(index=False, float_format="%.5g"))
    draw(frame, found, args.out / "attribution.png")
    table = frame.groupby(["method", "left out"], sort=False)["LDS"].agg(["mean", "std"])
    print(table.unstack("left out").round(3).to_string())
    print(found.groupby("method", sort=False)["AUC"].agg(["mean", "std"]).round(3).to_string())
    return frame


if __name__ == "__main__":
    main()
