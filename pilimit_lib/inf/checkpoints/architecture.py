"""Which network a checkpoint is of: the constructor arguments that it holds, or that its tensors
imply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALPHAS = ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")


def recorded_architecture(state: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments that a checkpoint of ours holds, where they suffice to build the
    network."""
    found = dict(state["_extra_state"])
    if found.get("activation") == "custom":
        raise ValueError(
            "the checkpoint's activation is a function that only its author has; build the network "
            "with it and call load_state_dict"
        )
    return found


def architecture_of(state: Mapping[str, Any], layernorm: bool | None) -> dict[str, Any]:
    """The constructor arguments of the InfMLP that `state` came from. `layernorm`: what a
    checkpoint of the original library does not say, else None."""
    if "_extra_state" not in state:
        return _implied_architecture(state, layernorm)
    found = recorded_architecture(state)
    if layernorm not in (None, found["layernorm"]):
        raise ValueError(
            f"the checkpoint says layernorm={found['layernorm']}, the call says {layernorm}"
        )
    return found | _dtypes(state)


def _implied_architecture(state: Mapping[str, Any], layernorm: bool | None) -> dict[str, Any]:
    """Of a checkpoint of the original library: its multipliers, and the shapes of its tensors."""
    numbers = [
        int(key.split(".")[1]) for key in state if key.startswith("layers.") and key.endswith(".A")
    ]
    if not numbers or "layers.0.A" not in state or not set(ALPHAS) <= set(state):
        raise ValueError(f"not a checkpoint of an InfMLP: found {sorted(map(str, state))[:8]}")
    if layernorm is None:
        raise ValueError(
            "a checkpoint of the original library does not say whether the network uses layer "
            "norm; pass layernorm=True or layernorm=False"
        )
    d_in, r = state["layers.0.A"].shape
    alphas = {name: float(state[name]) for name in ALPHAS}
    if "layers.0.bias" not in state:
        alphas["bias_alpha"] = 0.0
    return {
        "d_in": d_in,
        "d_out": state[f"layers.{max(numbers)}.A"].shape[1],
        "r": r,
        "L": max(numbers) - 1,
        "layernorm": layernorm,
        **alphas,
    }


def _dtypes(state: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments for the dtypes of the input layer, and of rows or moments as they
    are stored."""
    places = {"dtype": ("layers.0.A",), "row_dtype": ("layers.1.A", "layers.1.V")}
    return {name: state[key].dtype for name, keys in places.items() for key in keys if key in state}
