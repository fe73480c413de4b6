"""Learning rates per parameter: the paper's multipliers, and how rates scale with width."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def param_groups(
    net: nn.Module,
    lr: float,
    weight_decay: float = 0,
    first_layer_lr_mult: float = 1,
    last_layer_lr_mult: float = 1,
    bias_lr_mult: float = 1,
    apply_lr_mult_to_wd: bool = True,
    optimizer: str | type | torch.optim.Optimizer = "sgd",
    base_width: int = 64,
) -> list[dict[str, Any]]:
    """Parameter groups with the paper's learning-rate multipliers, for networks of any width with a
    list `layers`.

    Args:
        first_layer_lr_mult, last_layer_lr_mult: of the weights of the input layer and the readout;
        bias_lr_mult: of every bias.
        apply_lr_mult_to_wd: where False, weight decay is divided by the multiplier, so that lr · wd
        is the same for every group.
        optimizer: what the groups are for, by name or class. SGD needs no more than the above.
            Adam and its kin, whose steps have the size of the rate whatever the gradient is, get
            rates that depend on width n in finite (π- and μ-) networks: times sqrt(base_width / n)
            for each side of a weight that grows with n, so that one `lr` suits all widths (μP; see
            `width_factor`). Weight decay is divided by that, so that lr · wd stays.
        base_width: the width at which `lr` is the rate of every group.
    """
    layers = getattr(net, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) < 2:
        raise TypeError(
            "param_groups needs a network with a ModuleList `layers` of input, hidden and readout "
            "layers, "
            f"got {type(net).__name__}; write the groups by hand for other networks"
        )
    adaptive = _is_adaptive(optimizer)
    if not base_width > 0:
        raise ValueError(f"base_width is {base_width}; a positive width was expected")
    mults = {
        "first": first_layer_lr_mult,
        "hidden": 1,
        "last": last_layer_lr_mult,
        "bias": bias_lr_mult,
    }
    for kind, mult in mults.items():
        if mult < 0 or mult == 0 and weight_decay and not apply_lr_mult_to_wd:
            raise ValueError(
                f"the learning-rate multiplier of {kind} parameters is {mult}; weight decay can't "
                "be divided by it "
                "(apply_lr_mult_to_wd=True, or a positive multiplier)"
            )
    members: dict[tuple[str, float], list[Tensor]] = {}
    for number, layer in enumerate(layers):
        place = {0: "first", len(layers) - 1: "last"}.get(number, "hidden")
        for name, parameter in layer.named_parameters():
            kind = "bias" if name == "bias" else place
            factor = width_factor(layer, name, place, base_width) if adaptive else 1.0
            members.setdefault((kind, factor), []).append(parameter)
    # what stands between the layers, such as the scale of a normalisation
    known = {id(parameter) for parameter in layers.parameters()}
    between = [parameter for parameter in net.parameters() if id(parameter) not in known]
    if between:
        members.setdefault(("hidden", 1.0), []).extend(between)
    groups = []
    for (kind, factor), parameters in sorted(members.items(), key=lambda item: _KINDS(item[0][0])):
        mult = mults[kind]
        decay = weight_decay if apply_lr_mult_to_wd or not weight_decay else weight_decay / mult
        groups.append(
            {
                "params": parameters,
                "lr": lr * mult * factor,
                "weight_decay": decay / factor,
                "name": kind,
            }
        )
    return groups


_KINDS = ("first", "hidden", "last", "bias").index
_ADAPTIVE = (
    "adam",
    "adamw",
    "nadam",
    "radam",
    "adamax",
    "lion",
    "adagrad",
    "rmsprop",
    "muadam",
    "muadamw",
)


def width_factor(layer: nn.Module, name: str, place: str, base_width: int) -> float:
    """By what the rate of Adam is multiplied for parameter `name` of a finite `layer`, the "first",
    "hidden" or "last" of its network, so that one step changes pre-activations alike at every width
    n; 1 for layers of infinite width.

    Coordinates of pre-activations are of order n^-½ here, and a step of Adam changes each weight by
    the rate. A sum over n inputs that the step is aligned with is n · n^-½ times that, so weights
    may move by n_out^-½ n_in^-½, where a side that is data or outputs counts as 1, and biases by
    n_out^-½. Source: Yang et al. 2022 (Tensor Programs V), table 8; mup's MuAdam in this scaling.
    """
    n_in, n_out = getattr(layer, "n_in", None), getattr(layer, "n_out", None)
    if n_in is None or n_out is None:
        return 1.0
    grows = [n_out] if place != "last" else []
    if place != "first" and name != "bias":
        grows.append(n_in)
    return math.prod(math.sqrt(base_width / n) for n in grows)


def _is_adaptive(optimizer: str | type | torch.optim.Optimizer) -> bool:
    """Whether the size of an optimiser's step does not depend on that of the gradient."""
    kind = optimizer if isinstance(optimizer, str | type) else type(optimizer)
    name = (kind if isinstance(kind, str) else kind.__name__).lower()
    if name in _ADAPTIVE:
        return True
    if name in ("sgd", "pisgd", "infsgd", "musgd"):
        return False
    raise ValueError(
        f"optimizer is {optimizer!r}; 'sgd' or one of {', '.join(_ADAPTIVE)} was expected: how "
        "rates scale with width is known for these"
    )
