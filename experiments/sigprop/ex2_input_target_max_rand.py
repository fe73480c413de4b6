r"""Example 2: each input is compared with the closest target, one drawn at random among equally
close ones.

    python -m experiments.sigprop.ex2_input_target_max_rand
    python -m experiments.sigprop.ex2_input_target_max_rand --network mlp --width 32 --loss v9 \
        --epochs 25 --seeds 0 1 2 3
    python -m experiments.sigprop.ex2_input_target_max_rand --dataset cifar10 --data FOLDER \
        --network vgg --width 16

Backprop and frozen hidden layers run beside it as controls, on the same layers with the same
initial values.
"""

from __future__ import annotations

from .cli import main
from .methods import Settings

if __name__ == "__main__":
    main(
        "ex2_input_target_max_rand",
        "Signal propagation, input target max rand",
        Settings(loss="v14"),
        "results/sigprop/ex2",
    )
