"""The library against pilimit_orig on real images: 100 steps on CIFAR-10, with the paper's
hyperparameters among others.

    # a table; DIR holds cifar-10-batches-py
    python -m experiments.tests.compare_mlp_cifar10 [--data DIR]
    # the same as tests; skipped where ../shared/data lacks the images
    pytest tests/compare_mlp_cifar10.py -m slow

Compared as in compare_mlp: after every step, relative to the largest output.
"""

import sys
from functools import cache

import torch

from pilimit_orig.cifar10.data import load

from ..training.flags import plain_command_line
from .compare_mlp import Case, table

PAPER = dict(
    lr=1.0,
    wd=1e-5,
    gclip=0.4,
    gclip_per_param=True,
    mults=(0.1, 4.0, 0.5),
    apply_lr_mult_to_wd=False,
    r=32,
)
CASES = [
    Case("the paper's settings", L=2, **PAPER),
    Case("the paper's settings, depth 0", L=0, **PAPER),
    Case("layer norm", L=1, layernorm=True, **PAPER),
    Case(
        "momentum, clipped together",
        L=1,
        **PAPER | dict(lr=0.1, momentum=0.9, gclip_per_param=False),
    ),
    Case("squared error, batch 32", L=1, batch=32, loss="mse", **PAPER),
]


@cache
def images(root: str) -> tuple:
    """The first 3200 training images and their labels, and 200 test images, normalised."""
    x, y, test_x, _ = load(root, 3200, 200)
    return x, y, test_x


def batches(root: str):
    """A function from a case to its data: consecutive images in batches."""

    def data_of(case, dtype):
        x, y, test_x = images(root)
        count = case.steps * case.batch
        return (
            x[:count].reshape(case.steps, case.batch, -1).to(dtype),
            y[:count].reshape(case.steps, -1),
            test_x.to(dtype),
        )

    return data_of


def main(argv=None):
    arguments = plain_command_line("tests.compare_mlp_cifar10", __doc__)
    arguments.add_argument(
        "--data",
        default="./dataset",
        help="folder that holds cifar-10-batches-py (default ./dataset)",
    )
    args = arguments.parse_args(argv)
    try:
        images(args.data)
    except (OSError, ValueError) as error:
        arguments.error(str(error))
    torch.manual_seed(0)
    return 1 if table(CASES, batches(args.data)) else 0


if __name__ == "__main__":
    sys.exit(main())
