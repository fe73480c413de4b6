r"""Example 4: each input is compared with the k closest targets; a monitor shows loss and accuracy
of each layer.

    python -m experiments.sigprop.ex4_input_target_topk
    python -m experiments.sigprop.ex4_input_target_topk --k 10 --dataset fashion_mnist \
        --data FOLDER --network vgg --width 16

Backprop and frozen hidden layers run beside it as controls.
"""

from __future__ import annotations

from .cli import main
from .methods import Settings

if __name__ == "__main__":
    main(
        "ex4_input_target_topk",
        "Signal propagation, input target top-k",
        Settings(loss="v15"),
        "results/sigprop/ex4",
        watch=True,
    )
