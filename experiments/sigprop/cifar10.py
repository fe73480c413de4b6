r"""CIFAR-10 at 32 x 32: signal propagation beside frozen hidden layers and backprop.

    python -m experiments.sigprop.cifar10 --data FOLDER
    python -m experiments.sigprop.cifar10 --data FOLDER --network vgg --width 64 --epochs 100

Three seeds of 20 epochs with flips and shifts. An interrupted command goes on where it was when it
is given again. Each epoch is a line of OUT/METHOD-SEED.csv: the accuracy as trained, that after the
batch norms were measured anew, and that of a ridge regression on the last hidden layer, which asks
for the features alone. The layers' targets are one row per class, partners are told by the label,
similarities are cosines, and every learning rate falls to zero. The norm was chosen on held-out
training images by `choose`; `lag` asks what is behind at a rate that does not fall.
"""

from __future__ import annotations

from .cli import main
from .methods import Settings

PROTOCOL = Settings(
    dataset="cifar10",
    network="strided",
    width=16,
    loss="v9",
    partners="label",
    per_class=True,
    cosine=True,
    temperature=0.1,
    epochs=20,
    batch=128,
    lr=2e-3,
    output_lr=2e-3,
    decay=True,
    augment=True,
    probe=5000,
)

if __name__ == "__main__":
    main(
        "cifar10",
        "Signal propagation on CIFAR-10",
        PROTOCOL,
        "results/sigprop/cifar10",
        seeds=(0, 1, 2),
    )
