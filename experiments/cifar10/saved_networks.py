"""Networks from saved files: infinite or finite ones of this library, and infinite ones of the
paper's code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pilimit_lib.core import load
from pilimit_lib.inf import FinPiMLPSample, InfMLP
from pilimit_lib.inf.checkpoints.architecture import ALPHAS

UNITS = ("memory", "degree", "fit", "activation", "row_budget")


def load_network(
    path: str,
    given: Mapping[str, Any],
    from_pilimit_orig: bool = False,
    device: torch.device | str = "cpu",
    row_dtype: torch.dtype | None = None,
) -> nn.Module:
    """The network saved at `path`.

    `given` are settings that the user named (None: not named): r, L, layernorm and the four alphas.
    What the file knows is compared with them, what it doesn't know is taken from them. Raises
    ValueError where they contradict each other.
    """
    if from_pilimit_orig:
        net: nn.Module = InfMLP.from_pilimit_orig(path, device=device, row_dtype=row_dtype)
    else:
        state = load(path)
        if not isinstance(state, dict):
            raise ValueError(f"{path} holds a {type(state).__name__}, not a network's state_dict")
        # a training run's checkpoint.pt holds the network beside the optimiser
        state = state.get("model", state)
        if "layers.0.weight" in state:
            net = _finite(path, state, given).to(device)
        else:
            # Files of the original library don't say whether layer norm is used; no flag means no.
            known = "_extra_state" in state
            net = InfMLP.from_state_dict(
                state, None if known else bool(given.get("layernorm")), device=device
            )
    differing = [
        f"{name} is {getattr(net, name)}, {value} was given"
        for name, value in given.items()
        if value is not None and getattr(net, name) != value
    ]
    if differing:
        raise ValueError(
            f"the network in {path} is another one: {'; '.join(differing)}. Leave these flags out "
            "to take its own"
        )
    return net


def _finite(path: str, state: Mapping[str, Any], given: Mapping[str, Any]) -> FinPiMLPSample:
    """A finite network: its sizes are those of its tensors, all else is in the settings.json of its
    training run.

    That is its multipliers, and the truncated activation of a network sampled from moments; without
    the file units are ReLU.
    """
    beside = Path(path).parent / "settings.json"
    known = json.loads(beside.read_text()) if beside.is_file() else {}
    alphas = {name: known.get(name) if given.get(name) is None else given[name] for name in ALPHAS}
    missing = [f"--{name.replace('_', '-')}" for name in ALPHAS[:3] if alphas[name] is None]
    if missing:
        raise ValueError(
            f"{path} is a finite network, whose file doesn't hold its multipliers, and no "
            "settings.json lies beside "
            f"it: give {', '.join(missing)}"
        )
    count = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    width, d_in = state["layers.0.weight"].shape
    layernorm = (
        known.get("layernorm", False) if given.get("layernorm") is None else given["layernorm"]
    )
    inf = InfMLP(
        d_in,
        len(state[f"layers.{count - 1}.weight"]),
        state["layers.0.omega"].shape[1],
        count - 2,
        **alphas,
        layernorm=layernorm,
        **{name: known[name] for name in UNITS if name in known},
    )
    net = FinPiMLPSample(inf, width)
    net.load_state_dict(state)
    return net
