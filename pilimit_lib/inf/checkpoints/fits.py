"""Whether a checkpoint fits a network: asked before anything is changed, since torch would find out
halfway through. A network here is any module whose `layers` are π-layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..bias import bias_misfit
from ..moments.layer import series_misfit
from ..rows.layer import RowLayer
from ..rows.parameter import ROWS
from ..rows.storage import EXTRAS, SUFFIXES, as_rows, codes_misfit, elsewhere, storage_misfit
from .architecture import ALPHAS

FOLDED = tuple(f"folded.{name}" for name in ("V", "kappa", "rows", "error"))
# What a checkpoint of a layer of rows may hold beside its parameters.
OF_ROWS = (*EXTRAS, "origin", "layer_alpha", "limits.merged", "limits.error", *FOLDED)


def misfits(net: nn.Module, state: Mapping[str, Any], strict: bool) -> list[str]:
    """What in `state` can't be loaded into `net`, an InfMLP, apart from the number of rows."""
    problems, known = [], {*ALPHAS, "_extra_state"}
    for number, layer in enumerate(net.layers):
        prefix = f"layers.{number}."
        expected, optional = _entries(layer, state, prefix)
        known |= {prefix + name for name in (*expected, *optional, "bias", "bias_alpha")}
        problems += _shape_misfits(expected, state, prefix, strict)
        problems += _bias_misfits(layer, state, prefix)
        if number:
            problems += _count_misfits(state, prefix)
            problems += _kernel_misfits(layer, state, prefix)
            problems += _rows_misfits(layer, state, prefix)
    if strict:
        problems += _unknown(state, known)
    needed = {*ALPHAS, "layernorm"}
    if not needed <= set(state.get("_extra_state", needed)):
        problems.append(f"_extra_state lacks settings of an InfMLP: {state['_extra_state']}")
    layers = {key.split(".")[1] for key in state if key.startswith("layers.")}
    if strict and len(layers) != len(net.layers):
        problems.append(
            f"the checkpoint has {len(layers)} layers, the network {len(net.layers)} "
            f"(L={len(net.layers) - 2})"
        )
    return problems


def fixed_misfits(net: nn.Module, state: Mapping[str, Any], strict: bool) -> list[str]:
    """What in `state` can't be loaded into `net`, whose `layers` never change size."""
    shapes = {name: list(parameter.shape) for name, parameter in net.named_parameters()}
    problems = list(_shape_misfits(shapes, state, "", strict))
    for number, layer in enumerate(net.layers):
        problems += _bias_misfits(layer, state, f"layers.{number}.")
        if number:
            problems += _kernel_misfits(layer, state, f"layers.{number}.")
    if strict:
        biases = (f"layers.{number}.bias" for number in range(len(net.layers)))
        problems += _unknown(state, {*net.state_dict(), *biases})
    return problems


def _entries(
    layer: nn.Module, state: Mapping[str, Any], prefix: str
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """What a checkpoint of `layer` must hold, with shapes, and what else it may hold."""
    expected = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    if isinstance(layer, RowLayer):
        if elsewhere():
            expected = {name: shape for name, shape in expected.items() if name not in ROWS}
        return expected, OF_ROWS
    if not hasattr(layer, "series"):
        return expected, ()
    if prefix + "A" not in state:
        return expected, ("kappa",)
    # A checkpoint of rows, which are summed into V.
    del expected["V"]
    return expected | {"A": [0, layer.r_out], "Amult": [0], "B": [0, layer.r]}, OF_ROWS


def _shape_misfits(
    expected: Mapping[str, list[int]], state: Mapping[str, Any], prefix: str, strict: bool
) -> Iterator[str]:
    for name, shape in expected.items():
        if prefix + name not in state:
            if strict:
                yield f"{prefix}{name} is missing"
            continue
        # The A of an input layer is no row; its number of columns is that of the ranks.
        free = name in ROWS and prefix != "layers.0."
        got = list(state[prefix + name].shape)
        if len(got) != len(shape) or got[free:] != shape[free:]:
            wanted = ["rows", *shape[1:]] if free else shape
            yield f"{prefix}{name} has shape {got}; expected {wanted}"


def _count_misfits(state: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Rows come as A, Amult, B and origin of one length."""
    counts = {
        name: len(state[prefix + name]) for name in (*ROWS, "origin") if prefix + name in state
    }
    if len(set(counts.values())) > 1:
        yield f"{prefix[:-1]} has rows of different number: {counts}"


def _bias_misfits(layer: nn.Module, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
    misfit = bias_misfit(layer, state, prefix)
    if misfit:
        yield misfit


def _rows_misfits(layer: nn.Module, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Rows in eight bits that can't be read, and rows with numbers that the layer's storage can't
    hold."""
    for name in ("A", "B"):
        pieces = {
            suffix: state[key]
            for suffix in ("", *SUFFIXES[name])
            if (key := prefix + name + suffix) in state
        }
        if "" not in pieces:
            continue
        misfit = codes_misfit(pieces, prefix + name)
        if misfit is None and isinstance(layer, RowLayer):
            storage = layer.row_storage(name).storage
            misfit = storage_misfit(as_rows(pieces, name), storage, prefix + name)
        if misfit:
            yield misfit


def _kernel_misfits(layer: nn.Module, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Moments mean nothing under another kernel."""
    folded = getattr(layer, "folded", None)
    series = getattr(layer if folded is None else folded, "series", None)
    if prefix + "A" in state and hasattr(layer, "series") and series.activation != "relu":
        yield (f"{prefix}A holds rows of ReLU units, this layer has activation {series.activation}")
        return
    kappa = state.get(f"{prefix}folded.kappa")
    if hasattr(layer, "series"):
        kappa = state.get(f"{prefix}kappa", kappa)
    if kappa is None:
        return
    if series is None:
        yield (
            f"{prefix}folded holds folded rows; build the network with row_budget, or with "
            "memory='moments'"
        )
        return
    problem = series_misfit(series, kappa)
    if problem:
        yield f"{prefix}: {problem}"


def _unknown(state: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    unknown = sorted(set(state) - known)
    if unknown:
        yield f"unknown entries: {unknown[:8]}"
