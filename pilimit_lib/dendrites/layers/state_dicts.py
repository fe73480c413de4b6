"""State dicts of a layer in their three forms: dendritic, exported and plain.

dendritic   neuron.*   dendrites.<k>.{w, v, body.*, stats.*}
exported    neuron.*   bodies.<k>.*   w [K n]   v [K(K-1)/2 n], see exported.py
plain       what the neurons had before the conversion: a pretrained network
"""

from typing import Any

from torch import nn


def to_dendritic(state: dict, prefix: str, neuron: nn.Module) -> None:
    """Rename, in place, what an exported or plain state_dict holds for the layer at ``prefix``."""
    keys = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    outer = "neuron.neuron." if "neuron" in dict(neuron.named_children()) else "neuron."
    if not any(key.startswith(outer) for key in keys):
        for key in keys:
            if not key.startswith("dendrites."):
                state[f"{prefix}neuron.{key}"] = state.pop(prefix + key)
        return
    if not any(key.startswith("bodies.") for key in keys):
        return
    w, v = state.pop(prefix + "w"), state.pop(prefix + "v")
    for k, own in enumerate(w):
        state[f"{prefix}dendrites.{k}.w"] = own
        if k:
            state[f"{prefix}dendrites.{k}.v"] = v[k * (k - 1) // 2 : k * (k + 1) // 2]
    for key in keys:
        if key.startswith("bodies."):
            _, k, name = key.split(".", 2)
            state[f"{prefix}dendrites.{k}.body.{name}"] = state.pop(prefix + key)


def grown_in(state: dict, prefix: str) -> dict[str, Any] | None:
    """How many dendrites a dendritic state_dict has for the layer at ``prefix``, as the part of its
    structure; None where it does not speak of the layer."""
    if not any(key.startswith(prefix) for key in state):
        return None
    inner = f"{prefix}dendrites."
    keys = [key.removeprefix(inner) for key in state if key.startswith(inner)]
    count = 1 + max((int(key.partition(".")[0]) for key in keys), default=-1)
    found = {
        "dendrites": count,
        "candidate": any(key.startswith(f"{count - 1}.stats.") for key in keys),
    }
    if count:
        found["neurons"] = state[f"{inner}0.w"].shape[0]
    return found
