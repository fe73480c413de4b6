"""Which network a checkpoint is of: the constructor arguments that it holds, or that its tensors
imply.

A state dict holds the arguments as a tensor, `_extra_state`: the bytes of JSON, uint8 [n], so that
what stores tensors only (safetensors, accelerate, the Hub) stores a network too. Checkpoints of
earlier versions hold a dictionary there, and load as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..entries import number_misfit, tensor_misfit

ALPHAS = ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")
KEY = "_extra_state"
LONGEST = 2**20  # bytes; a network of a thousand layers has a tenth of that
Network = TypeVar("Network", bound=nn.Module)


def encoded(settings: Mapping[str, Any]) -> Tensor:
    """The bytes of `settings` as JSON: uint8 [n] on the CPU."""
    text = json.dumps(settings, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def decoded(found: Any) -> dict[str, Any]:
    """The settings that `encoded` made a tensor of, or that an earlier version left as they were.
    Raises ValueError for anything else."""
    if isinstance(found, Mapping):
        return _tuples(found)
    if tensor_misfit(found, KEY, ndim=1, anything=True) or len(found) > LONGEST:
        shown = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(f"{KEY} is {shown:.60}, not the architecture of a network")
    try:
        # A state dict whose tensors were all converted holds the same numbers as floats.
        text = bytes(int(value) for value in found.flatten().tolist()).decode()
        settings = json.loads(text, parse_constant=_no_number)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{KEY} is no architecture of a network: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{KEY} is a {type(settings).__name__} of JSON, not settings by name")
    return _tuples(settings)


def built(make: Callable[..., Network], settings: Mapping[str, Any], **how: Any) -> Network:
    """`make(**settings, **how)`, or ValueError where a checkpoint's settings are none for it."""
    if settings.get("activation") == "custom":
        raise ValueError(
            "the checkpoint's activation is a function that only its author has; build the network "
            "with it and call load_state_dict"
        )
    try:
        return make(**settings, **how)
    except TypeError as error:
        raise ValueError(
            f"{KEY} is not the architecture of such a network ({error}); it says "
            f"{dict(settings)!r:.300}"
        ) from error


def architecture_of(state: Mapping[str, Any], layernorm: bool | None) -> dict[str, Any]:
    """The constructor arguments of the InfMLP that `state` came from. `layernorm`: what a
    checkpoint of the original library does not say, else None."""
    if KEY not in state:
        return _implied_architecture(state, layernorm)
    found = decoded(state[KEY])
    if layernorm not in (None, found.get("layernorm")):
        raise ValueError(
            f"the checkpoint says layernorm={found.get('layernorm')}, the call says {layernorm}"
        )
    numbers = {key.split(".")[1] for key in state if key.startswith("layers.")}
    if found.get("L") != len(numbers) - 2:
        raise ValueError(
            f"the checkpoint says L={found.get('L')!r:.40} and has {len(numbers)} layers; "
            "L + 2 were expected"
        )
    places = {"dtype": ("layers.0.A",), "row_dtype": ("layers.1.A", "layers.1.V")}
    return found | {name: dtype_of(state, *keys) for name, keys in places.items()}


def dtype_of(state: Mapping[str, Any], *keys: str) -> torch.dtype | None:
    """The dtype of the first weights that `state` has under one of `keys`. What is not even a
    number is left to `load_state_dict` to refuse."""
    for key in keys:
        value = state.get(key)
        if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.int8):
            return value.dtype
    return None


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
    ends = ("layers.0.A", f"layers.{max(numbers)}.A")
    problems = [tensor_misfit(state.get(name), name, ndim=2) for name in ends]
    problems += [number_misfit(state[name], name) for name in ALPHAS]
    if any(problems):
        raise ValueError("; ".join(problem for problem in problems if problem))
    d_in, r = state[ends[0]].shape
    alphas = {name: float(state[name]) for name in ALPHAS}
    if "layers.0.bias" not in state:
        alphas["bias_alpha"] = 0.0
    return {
        "d_in": d_in,
        "d_out": state[ends[1]].shape[1],
        "r": r,
        "L": max(numbers) - 1,
        "layernorm": layernorm,
        **alphas,
    }


def _tuples(value: Any) -> Any:
    """JSON has lists where the constructors have tuples."""
    if isinstance(value, Mapping):
        return {str(name): _tuples(entry) for name, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")
