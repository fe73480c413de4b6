"""Checkpoints of the paper's own code to InfMLP, and back.

The original counts layers from 1 and hidden layers without the input: its L is our L + 1, its layer
l our layers[l - 1]. It saved a whole pickled network, later a dictionary: first_layer_alpha,
last_layer_alpha, bias_alpha, last_bias_alpha, layernorm and, by layer, As {1: [d r], l: [m o]}, Bs
{l: [m r]}, Amult {l: [m]}, biases {l: [o]}. Files are read by torch's own restricted unpickler, to
which inert stand-ins for the original's two classes are made known, and mapped rather than read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn, serialization

from ...core import read_archive
from .architecture import ALPHAS

Network = TypeVar("Network", bound=nn.Module)
ARRAYS = {"As": "A", "Bs": "B", "Amult": "Amult", "biases": "bias"}
Source = str | os.PathLike | Mapping[str, Any]


class _Attributes:
    """Stands in for an object of the original code: its attributes, whatever they are."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"an object's state is a {type(state).__name__}, not its attributes")
        self.fields = state


_STAND_INS = [
    type(name, (_Attributes,), {"__module__": module, "__qualname__": name})
    for module, name in (
        ("inf.pimlp", "InfPiMLP"),
        ("pimlp", "InfPiMLP"),
        ("inf.dynamicarray", "DynArr"),
        ("dynamicarray", "DynArr"),
    )
]


def read_pilimit_orig(source: Source) -> dict[str, Any]:
    """The original's dictionary of a network, from a file that it or convert_net wrote or from such
    a dictionary.

    Nothing in a file is executed; its arrays stay there until they are used. ValueError says what
    is damaged or foreign.
    """
    found = source if isinstance(source, Mapping) else _load(Path(source))
    try:
        return _dictionary(found)
    except ValueError as error:
        where = "" if isinstance(source, Mapping) else f"{source}: "
        raise ValueError(f"{where}not a network of the original code: {error}") from error


def build(
    net_class: type[Network],
    source: Source,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    row_dtype: torch.dtype | None = None,
    **how: Any,
) -> Network:
    """A network of the right shape with the weights of `source`. Rows keep the precision they were
    saved in, unless told.

    `net_class` takes the arguments of InfMLP, `how` are further ones; with memory="moments" rows go
    from the file straight into moments.
    """
    found = read_pilimit_orig(source)
    kept = found["As"][len(found["As"])].dtype
    own = kept if kept == torch.float64 else None
    # Sums of many rows need more than the precision of one.
    rows = own if how.get("memory") == "moments" else kept
    net = net_class(
        **_architecture(found),
        device=device,
        row_dtype=row_dtype or rows,
        dtype=dtype or own,
        **how,
    )
    load(net, found)
    return net


def load(net: nn.Module, source: Source) -> None:
    """Give `net` the weights, alphas and layer norm of `source`; the network keeps its own dtypes
    and device.

    Raises ValueError, with the network as it was, where sizes do not fit.
    """
    found = read_pilimit_orig(source)
    expected = _architecture(found)
    differing = [
        f"{name} is {getattr(net, name)} here, {expected[name]} in the checkpoint"
        for name in ("d_in", "d_out", "r", "L")
        if getattr(net, name) != expected[name]
    ]
    state = {"_extra_state": expected}
    for number, layer in enumerate(net.layers, 1):
        alpha = expected["last_bias_alpha" if number == len(net.layers) else "bias_alpha"]
        state[f"layers.{number - 1}.bias_alpha"] = alpha
        if (layer.bias is None) != (alpha == 0):
            differing.append(
                f"layers.{number - 1} has {'no bias' if layer.bias is None else 'a bias'} here, "
                f"its multiplier in the checkpoint is {alpha:g}"
            )
        for name, ours in ARRAYS.items():
            if number in found[name] and not (ours == "bias" and alpha == 0):
                state[f"layers.{number - 1}.{ours}"] = found[name][number]
    if differing:
        raise ValueError(
            "the checkpoint of the original code does not fit this network "
            "(InfMLP.from_pilimit_orig builds one that fits; the original's L is L + 1 here):\n  "
            + "\n  ".join(differing)
        )
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            "arrays of the checkpoint do not fit each other (our layers.0 is layer 1 of the "
            f"original): {error}"
        ) from error


def to_pilimit_orig(net: nn.Module) -> dict[str, Any]:
    """The original's dictionary of `net`, as plain tensors: what pilimit_orig.convert_net writes.
    Pending rows are left out."""
    layers = dict(enumerate(net.layers, 1))
    for number, layer in layers.items():
        if not hasattr(layer, "A") or getattr(layer, "folded", None) is not None:
            raise ValueError(
                f"layers.{number - 1} keeps moments (memory='moments' or a row_budget); the "
                "original code knows rows only, and moments can't be turned back into them"
            )
    arrays = {
        name: {
            number: getattr(layer, ours).detach().clone().cpu()
            for number, layer in layers.items()
            if getattr(layer, ours, None) is not None
        }
        for name, ours in ARRAYS.items()
    }
    return {**{name: getattr(net, name) for name in ALPHAS}, "layernorm": net.layernorm, **arrays}


def _load(path: Path) -> Any:
    try:
        with _known_stand_ins():
            return read_archive(path, mmap=True)
    except ValueError as error:
        raise ValueError(
            f"{error}. Nothing in it was executed; plain pickles of the original code can be "
            "converted with python -m pilimit_orig.convert_net"
        ) from error


@contextmanager
def _known_stand_ins() -> Iterator[None]:
    before = serialization.get_safe_globals()
    serialization.add_safe_globals(_STAND_INS)
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _dictionary(found: Any) -> dict[str, Any]:
    fields = found.fields if isinstance(found, _Attributes) else found
    if not isinstance(fields, Mapping):
        raise ValueError(f"found a {type(found).__name__}")
    missing = [name for name in (*ALPHAS, "layernorm", *ARRAYS) if name not in fields]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing, found "
            f"{', '.join(map(str, list(fields)[:6])) or 'nothing'}"
        )
    out = {name: _alpha(name, fields) for name in ALPHAS} | {"layernorm": bool(fields["layernorm"])}
    for name in ARRAYS:
        held = {} if fields[name] is None and name == "biases" else fields[name]
        if not isinstance(held, Mapping):
            raise ValueError(f"{name} is a {type(held).__name__}, not a dictionary of arrays")
        out[name] = {
            layer: _array(f"{name}[{layer}]", array)
            for layer, array in held.items()
            if array is not None
        }
    layers = sorted(out["As"])
    if layers != list(range(1, len(layers) + 1)) or len(layers) < 2:
        raise ValueError(
            f"As has the layers {layers}, expected 1, 2, … without gaps and at least two"
        )
    for layer in (layers[0], layers[-1]):
        if out["As"][layer].ndim != 2:
            raise ValueError(
                f"As[{layer}] has shape {list(out['As'][layer].shape)}, expected two dimensions"
            )
    return out


def _alpha(name: str, fields: Mapping[str, Any]) -> float:
    value = fields[name]
    if value is None and name == "last_bias_alpha":
        value = fields["bias_alpha"]  # the original's own default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | Tensor)
        or not abs(float(value)) < float("inf")
    ):
        raise ValueError(f"{name} is {value!r:.40}, not a finite number")
    return float(value)


def _array(name: str, array: Any) -> Tensor:
    """The tensor itself, or the rows of a growing array that count."""
    if isinstance(array, _Attributes):
        buffer, rows = (getattr(array, "fields", {}).get(key) for key in ("arr", "size"))
        if (
            not isinstance(buffer, Tensor)
            or not isinstance(rows, int)
            or buffer.ndim == 0
            or not 0 <= rows <= len(buffer)
        ):
            raise ValueError(
                f"{name} is a growing array that says it has {rows!r:.40} rows, which its buffer "
                "has not"
            )
        array = buffer[:rows]
    if not isinstance(array, Tensor) or not array.is_floating_point():
        kind = array.dtype if isinstance(array, Tensor) else type(array).__name__
        raise ValueError(f"{name} is a {kind}, not a floating-point array")
    return array.detach()


def _architecture(found: Mapping[str, Any]) -> dict[str, Any]:
    As = found["As"]
    (d_in, r), d_out = As[1].shape, As[len(As)].shape[1]
    return {
        "d_in": d_in,
        "d_out": d_out,
        "r": r,
        "L": len(As) - 2,
        "layernorm": found["layernorm"],
        **{name: found[name] for name in ALPHAS},
    }
