"""The named runs: what each is, the flags of the ordinary command that makes it, and their source.

Depth is counted as each command counts it: `--depth 1` of `cifar10mlp` (one hidden π-layer) and
`--depth 2` of `meta.train` and `cifar10test --gp` (two stages of ReLU units) are the same network,
the paper's.
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
RATES = "--lr .5 --gclip .2 --first-layer-lr-mult .2828 --last-layer-lr-mult 22.63"
LOGGED = f"{RATES} --wd 2.83e-5 --bias-alpha .0625"
PRINTED = (
    "--lr 1 --gclip .4 --wd 1e-5 --first-layer-lr-mult .1 --last-layer-lr-mult 4 --bias-alpha .5"
)
MOMENTS = "--memory moments --degree 2 --fit minimax"
KERNEL = "--dataset cifar10 --depth 2 --float"
OMNIGLOT = (
    "--dataset omniglot --ink --num-ways 5 --num-shots 1 --num-shots-test 1 --batch-size 8 "
    "--num-epochs 50 --num-batches 1000 --num-test-batches 125 --normalize None --dtype float32 "
    "--adapt-readout-only --step-size .354 --unrotated-test --sum-tasks"
)
FIXED = "--last-layer-lr-mult 0 --num-epochs 1 --num-batches 1"  # kernels learn nothing
META = (
    "--depth 2 --meta-lr 32 --grad-clip .1 --scheduler cosine --bias-alpha 1.414 "
    "--first-layer-alpha 1 --first-layer-lr-mult .4 --last-layer-lr-mult 0"
)
TRANSFER = (
    "--imagenet-classes paper --r 200 --depth 1 --lr .01 --gclip 0 --wd 1e-4 --batch-size 16 "
    "--epochs 26 --bias-alpha .5 --first-layer-lr-mult 1 --last-layer-lr-mult 1 --transfer "
    "--transfer-milestones 0,5,10,15,20,26 --float --kernel-reg 2e-4"
)
RIDGES = "Ridges"
SCRIPTS = "the authors' scripts"
LOG = "the authors' log of 61.17 % at r = 200"


@dataclass(frozen=True)
class Run:
    """One line of settings: the command `python -m experiments.<command>` with `flags`.

    `section` and `what` are its place and name on the page; `published`: the paper's figure in %,
    where it has one.
    """

    name: str
    section: str
    what: str
    command: str
    flags: str
    source: str
    published: float | None = None


def _mlp(
    name: str,
    what: str,
    flags: str,
    published: float | None = None,
    source: str = LOG,
    section: str = "CIFAR-10",
) -> Run:
    return Run(name, section, what, "cifar10.cifar10mlp", f"{CIFAR} {flags}", source, published)


def _beyond(name: str, what: str, flags: str) -> Run:
    return _mlp(
        f"beyond-{name}", what, flags, source="ours, on the paper's network", section="Beyond"
    )


def _kernel(
    name: str, what: str, flags: str, ridge: float, published: float | None = None
) -> list[Run]:
    """The kernel on all training images with a ridge, and what this ridge was chosen by."""
    command, source = "cifar10.cifar10test", "the depth of the paper's network"
    choice = f"{KERNEL} {flags} --train-subset-size 15000 --held-out 5000 --multiple-regs"
    whole = f"{KERNEL} {flags} --kernel-reg {ridge:g}"
    return [
        Run(name, "CIFAR-10", what, command, whole, source, published),
        Run(f"{name}-choice", RIDGES, what, command, choice, source),
    ]


def _meta(name: str, what: str, flags: str, published: float | None = None) -> Run:
    section = "MAML, Omniglot 5-way 1-shot"
    return Run(name, section, what, "meta.train", f"{OMNIGLOT} {flags}", SCRIPTS, published)


def _transfer(name: str, what: str, flags: str, published: float | None = None) -> Run:
    section, command = "ImageNet32 to CIFAR-10", "imagenet.transfer_imagenet"
    return Run(name, section, what, command, f"{TRANSFER} {flags}", SCRIPTS, published)


_ALL = [
    *_kernel("cifar10-nngp", "NNGP", "--gp", 0.1, 58.92),
    *_kernel("cifar10-ntk", "NTK, as published", "--ntk --ntk-as-published", 0.1, 59.63),
    *_kernel("cifar10-ntk-exact", "NTK of the network", "--ntk", 0.1),
    *(
        _mlp(
            f"cifar10-mu-{n}",
            f"finite μ, width {n}",
            f"--r 200 --width {n} --gaussian-init {LOGGED}",
            61.31 if n == 2048 else None,
        )
        for n in (128, 512, 2048)
    ),
    *(
        _mlp(
            f"cifar10-finite-pi-{n}",
            f"finite π, r = 200, width {n}",
            f"--r 200 --width {n} {LOGGED}",
            60.64 if n == 2048 else None,
        )
        for n in (128, 512, 2048)
    ),
    *(
        _mlp(
            f"cifar10-pi-r{r}",
            f"infinite π, moments, r = {r}",
            f"--r {r} {MOMENTS} {LOGGED}",
            {200: 61.17, 400: 61.5}.get(r),
        )
        for r in (50, 100, 200, 400)
    ),
    _mlp(
        "cifar10-pi-r400-printed",
        "infinite π, moments, r = 400, the settings that the README prints",
        f"--r 400 {MOMENTS} {PRINTED}",
        61.5,
        SCRIPTS,
    ),
    _mlp(
        "cifar10-pi-r200-rows",
        "infinite π, exact rows, r = 200",
        f"--r 200 {LOGGED}",
        61.17,
    ),
    _beyond("smooth", "label smoothing .1", f"--r 200 {MOMENTS} {LOGGED} --label-smoothing .1"),
    _beyond("average", "mean of epochs 41 to 50", f"--r 200 {MOMENTS} {LOGGED} --average-from 41"),
    _beyond(
        "constant-average",
        "rate never lowered, mean of epochs 31 to 50",
        f"--r 200 {MOMENTS} {LOGGED} --lr-drop-ratio 1 --gclip-drop-ratio 1 --average-from 31",
    ),
    *(
        _beyond(
            f"decay-{wd}",
            f"weight decay {wd}",
            f"--r 200 {MOMENTS} {RATES} --bias-alpha .0625 --wd {wd}",
        )
        for wd in ("4e-5", "6e-5", "8e-5")
    ),
    _beyond(
        "flips-shifts",
        "flips, and shifts by up to 2 pixels",
        f"--r 200 {MOMENTS} {LOGGED} --data-augment --augment-shift 2",
    ),
    _beyond(
        "mu-flips-shifts",
        "control: finite μ, width 2048, flips, and shifts by up to 2 pixels",
        f"--r 200 --width 2048 --gaussian-init {LOGGED} --data-augment --augment-shift 2",
    ),
    _beyond(
        "mu-smooth",
        "control: finite μ, width 2048, label smoothing .1",
        f"--r 200 --width 2048 --gaussian-init {LOGGED} --label-smoothing .1",
    ),
    *(
        Run(
            f"beyond-ensemble-{count}",
            "Beyond",
            f"{count} seeds of r = 200, outputs averaged",
            "paper.ensemble",
            f"cifar10-pi-r200 --seeds {','.join(map(str, range(count)))}",
            "ours, on the paper's network",
        )
        for count in (3, 5)
    ),
    _meta("omniglot-nngp", "NNGP", f"--gp {FIXED}", 43.80),
    _meta("omniglot-ntk", "NTK", f"--ntk {FIXED}", 51.72),
    _meta("omniglot-mu", "finite μ, width 1024", f"--hidden-size 1024 --mu-init {META}", 91.22),
    _meta(
        "omniglot-finite-pi",
        "finite π, r = 400, width 1024",
        f"--hidden-size 1024 --infnet-r 400 --Gproj-inner --Gproj-outer {META}",
        92.21,
    ),
    *(
        _meta(
            f"omniglot-pi-r{r}",
            f"infinite π, moments, r = {r}",
            f"--hidden-size -1 --infnet-r {r} {MOMENTS} {META}",
            91.46 if r == 400 else None,
        )
        for r in (100, 400)
    ),
    _transfer("imagenet-mu", "finite μ, width 2048", "--width 2048 --gaussian-init", 61.84),
    _transfer("imagenet-finite-pi-r200", "finite π, r = 200, width 2048", "--width 2048", 58.02),
    _transfer(
        "imagenet-finite-pi-r400", "finite π, r = 400, width 2048", "--width 2048 --r 400", 59.36
    ),
    _transfer("imagenet-pi", "infinite π, moments, r = 200", MOMENTS, 64.39),
]
RUNS = {run.name: run for run in _ALL}
