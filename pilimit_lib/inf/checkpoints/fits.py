"""Whether a checkpoint fits a network, and which network it would fit: asked before anything is
changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..bias import bias_misfit
from ..moments.layer import InfPiLinear, MomentsLayer, series_misfit
from ..rows.parameter import ROWS
from ..rows.storage import EXTRAS, SUFFIXES, as_rows, codes_misfit, elsewhere, storage_misfit

if TYPE_CHECKING:
    from ..mlp import InfMLP

ALPHAS = ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")


def recorded_architecture(state: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments that a checkpoint of ours holds, where they suffice to build the
    network."""
    found = dict(state["_extra_state"])
    if found.get("activation") == "custom":
        raise ValueError(
            "the checkpoint's activation is a function that only its author has; build the network "
            "with it "
            "and call load_state_dict"
        )
    return found


def architecture_of(state: Mapping[str, Any], layernorm: bool | None) -> dict[str, Any]:
    """The constructor arguments of the network that `state` came from."""
    if "_extra_state" in state:
        found = recorded_architecture(state)
        if layernorm not in (None, found["layernorm"]):
            raise ValueError(
                f"the checkpoint says layernorm={found['layernorm']}, the call says {layernorm}"
            )
        return found | _dtypes(state)
    numbers = [
        int(key.split(".")[1]) for key in state if key.startswith("layers.") and key.endswith(".A")
    ]
    if not numbers or "layers.0.A" not in state or not set(ALPHAS) <= set(state):
        raise ValueError(f"not a checkpoint of an InfMLP: found {sorted(map(str, state))[:8]}")
    if layernorm is None:
        raise ValueError(
            "a checkpoint of the original library does not say whether the network uses layer "
            "norm; "
            "pass layernorm=True or layernorm=False"
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


def misfits(net: InfMLP, state: Mapping[str, Any], strict: bool) -> list[str]:
    """What in `state` can't be loaded into `net`, apart from the number of rows. Torch would find
    out halfway through."""
    problems, known = [], {*ALPHAS, "_extra_state"}
    for i, layer in enumerate(net.layers):
        prefix = f"layers.{i}."
        expected, optional = _entries(layer, state, prefix)
        known |= {prefix + name for name in (*expected, *optional, "bias", "bias_alpha")}
        for name, shape in expected.items():
            if prefix + name not in state:
                problems += [f"{prefix}{name} is missing"] * strict
                continue
            got, free = list(state[prefix + name].shape), bool(i) and name in ROWS
            if len(got) != len(shape) or got[free:] != shape[free:]:
                problems.append(
                    f"{prefix}{name} has shape {got}; expected "
                    f"{['rows', *shape[1:]] if free else shape}"
                )
        counts = {
            name: len(state[key])
            for name in (*ROWS, "origin")
            if i and (key := prefix + name) in state
        }
        if len(set(counts.values())) > 1:
            problems.append(f"layers.{i} has rows of different number: {counts}")
        misfit = bias_misfit(layer, state, prefix)
        problems += ([misfit] if misfit else []) + (
            _kernel_misfit(layer, state, prefix) if i else []
        )
        problems += _rows_misfits(layer, state, prefix) if i else []
    unknown = sorted(set(state) - known)
    if unknown and strict:
        problems.append(f"unknown entries: {unknown[:8]}")
    if not {*ALPHAS, "layernorm"} <= set(state.get("_extra_state", {*ALPHAS, "layernorm"})):
        problems.append(f"_extra_state lacks settings of an InfMLP: {state['_extra_state']}")
    layers = {key.split(".")[1] for key in state if key.startswith("layers.")}
    if len(layers) != len(net.layers) and strict:
        problems.append(
            f"the checkpoint has {len(layers)} layers, the network {len(net.layers)} (L={net.L})"
        )
    return problems


def fixed_misfits(net: nn.Module, state: Mapping[str, Any], strict: bool) -> list[str]:
    """What in `state` can't be loaded into `net`, whose `layers` never change size."""
    problems, known = [], {*net.state_dict(), *(f"layers.{i}.bias" for i in range(len(net.layers)))}
    for name, parameter in net.named_parameters():
        if name not in state:
            problems += [f"{name} is missing"] * strict
        elif state[name].shape != parameter.shape:
            problems.append(
                f"{name} has shape {list(state[name].shape)}; expected {list(parameter.shape)}"
            )
    for i, layer in enumerate(net.layers):
        misfit = bias_misfit(layer, state, f"layers.{i}.")
        problems += ([misfit] if misfit else []) + (
            _kernel_misfit(layer, state, f"layers.{i}.") if i else []
        )
    unknown = sorted(set(state) - known)
    return problems + ([f"unknown entries: {unknown[:8]}"] if unknown and strict else [])


def _entries(
    layer: nn.Module, state: Mapping[str, Any], prefix: str
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """What a checkpoint of `layer` must hold, with shapes, and what else it may hold."""
    expected = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    if prefix == "layers.0.":
        return expected, ()
    folded = (f"folded.{name}" for name in ("V", "kappa", "rows", "error"))
    of_rows = (*EXTRAS, "origin", "layer_alpha", "limits.merged", "limits.error", *folded)
    if not isinstance(layer, InfPiLinear):
        return {
            name: shape for name, shape in expected.items() if name not in ROWS or not elsewhere()
        }, of_rows
    if prefix + "A" not in state:
        return expected, ("kappa",)
    # A checkpoint of rows, which are summed into V.
    del expected["V"]
    return expected | {"A": [0, layer.r_out], "Amult": [0], "B": [0, layer.r]}, of_rows


def _rows_misfits(layer: nn.Module, state: Mapping[str, Any], prefix: str) -> list[str]:
    """Rows in eight bits that can't be read, and rows with numbers that the layer's storage can't
    hold."""
    found = []
    for name in ("A", "B"):
        pieces = {
            suffix: state[key]
            for suffix in ("", *SUFFIXES[name])
            if (key := prefix + name + suffix) in state
        }
        if "" not in pieces:
            continue
        misfit = codes_misfit(pieces, prefix + name)
        if misfit is None and not isinstance(layer, MomentsLayer):
            misfit = storage_misfit(
                as_rows(pieces, name), layer.row_storage(name).storage, prefix + name
            )
        found += [misfit] if misfit else []
    return found


def _kernel_misfit(layer: nn.Module, state: Mapping[str, Any], prefix: str) -> list[str]:
    """Moments mean nothing under another kernel, so say so before anything is loaded."""
    if isinstance(layer, MomentsLayer):
        if f"{prefix}A" in state and layer.series.activation != "relu":
            return [
                f"{prefix}A holds rows of ReLU units, this layer has activation "
                f"{layer.series.activation}"
            ]
        found, series = (
            state.get(f"{prefix}kappa", state.get(f"{prefix}folded.kappa")),
            layer.series,
        )
    else:
        found, series = (
            state.get(f"{prefix}folded.kappa"),
            None if layer.folded is None else layer.folded.series,
        )
        if found is not None and series is None:
            return [
                f"{prefix}folded holds folded rows; build the network with row_budget, or with "
                "memory='moments'"
            ]
    problem = None if found is None else series_misfit(series, found)
    return [f"{prefix}: {problem}"] if problem else []
