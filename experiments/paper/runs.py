"""The named runs: what each is, the flags of the ordinary command that trains it, and their source.

Depth is counted as the commands do: `--depth 1` of `cifar10mlp` is one hidden π-layer, which is the
paper's network on CIFAR-10.
"""

from __future__ import annotations

from dataclasses import dataclass

# The paper's own scripts: batch, epochs, and after epoch 40 rate and clip times .15. 5,000 training
# images are held out, by which epochs and settings are chosen.
CIFAR = (
    "--dataset cifar10 --held-out 5000 --depth 1 --batch-size 8 --epochs 50 --gclip-per-param "
    "--scheduler multistep --lr-drop-milestones 40 --lr-drop-ratio .15 "
    "--gclip-drop-milestones 40 --gclip-drop-ratio .15 --no-apply-lr-mult-to-wd"
)
LOGGED = (
    "--lr .5 --gclip .2 --wd 2.83e-5 --first-layer-lr-mult .2828 --last-layer-lr-mult 22.63 "
    "--bias-alpha .0625"
)
PRINTED = (
    "--lr 1 --gclip .4 --wd 1e-5 --first-layer-lr-mult .1 --last-layer-lr-mult 4 --bias-alpha .5"
)
MOMENTS = "--memory moments --degree 2 --fit minimax"


@dataclass(frozen=True)
class Run:
    """One line of settings: the command `python -m experiments.<command>` with `flags`.

    `published`: the paper's figure in %, or None; `row`: the section of the page.
    """

    name: str
    row: str
    what: str
    command: str
    flags: str
    source: str
    published: float | None = None


def _cifar(name: str, what: str, flags: str, published: float | None, row: str) -> Run:
    source = "the authors' log of 61.17 % at r = 200"
    return Run(name, row, what, "cifar10.cifar10mlp", f"{CIFAR} {flags}", source, published)


INFINITE = [
    _cifar(
        f"cifar10-pi-r{r}",
        f"infinite π, r = {r}",
        f"--r {r} {MOMENTS} {LOGGED}",
        61.5 if r == 400 else None,
        "cifar10",
    )
    for r in (50, 100, 200, 400)
]
RUNS = {run.name: run for run in INFINITE}
