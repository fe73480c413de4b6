"""A network as a table that one would paste into a notebook: what it is, and what each layer
holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def summary(net: nn.Module, settings: Mapping[str, Any]) -> str:
    """The call that makes a network like `net`, with what `settings` say otherwise than its
    constructor's defaults, above one line per layer. Empty columns are left out."""
    lines = [_line(f"layers.{number}", layer, net) for number, layer in enumerate(net.layers)]
    norms = getattr(net, "norms", ())
    lines += [_line(f"norms.{number}", norm, net) for number, norm in enumerate(norms)]
    lines.append(_total(lines))
    columns = [name for name in lines[0] if any(line[name] != "" for line in lines)]
    table = [[name, *(_text(name, line[name]) for line in lines)] for name in columns]
    widths = [max(map(len, column)) for column in table]
    rows = [
        "  ".join(
            text.ljust(width) if name in ("layer", "kind", "window") else text.rjust(width)
            for name, text, width in zip(columns, row, widths)
        ).rstrip()
        for row in zip(*table)
    ]
    return "\n  ".join([_call(net, settings), *rows])


def _call(net: nn.Module, settings: Mapping[str, Any]) -> str:
    defaults = inspect.signature(type(net).__init__).parameters
    shown = []
    for name, value in settings.items():
        if name in defaults and defaults[name].default == value:
            continue
        text = repr(value)
        # The repr of a kernel that is a module has lines of its own.
        shown.append(f"{name}={type(value).__name__ if chr(10) in text else text}")
    return f"{type(net).__name__}({', '.join(shown)})"


def _line(name: str, layer: nn.Module, net: nn.Module) -> dict[str, Any]:
    """What the table says about one layer; "" where a column does not concern it."""
    of_rows = hasattr(layer, "row_storage")
    return {
        "layer": name,
        "kind": _kind(layer, net),
        "size": _size(layer),
        "rank": layer.omega.shape[1] if getattr(layer, "omega", None) is not None else "",
        "rows": len(layer) if of_rows else "",
        "P": _moments(layer),
        "window": _window(layer),
        "parameters": sum(parameter.numel() for parameter in layer.parameters()),
        "stored as": _dtype(layer),
        "bytes": sum(_bytes(layer)),
    }


def _total(lines: list[dict[str, Any]]) -> dict[str, Any]:
    total = dict.fromkeys(lines[0], "") | {"layer": "in all"}
    for name in ("rows", "parameters", "bytes"):
        held = [line[name] for line in lines if line[name] != ""]
        if held:
            total[name] = sum(held)
    return total


def _kind(layer: nn.Module, net: nn.Module) -> str:
    kind = "weights"
    if hasattr(layer, "running"):
        return "norm"
    if hasattr(layer, "kernel"):
        kind = "rows of a kernel"
    elif hasattr(layer, "row_storage"):
        kind = "rows"
    elif hasattr(layer, "P"):
        kind = "moments"
    if layer is net.layers[-1]:
        return f"{kind}, readout"
    return f"{kind}, input" if layer is net.layers[0] else kind


def _size(layer: nn.Module) -> str:
    """Sizes in and out: ranks of an infinite layer, widths of a finite one."""
    if hasattr(layer, "n_in"):
        return f"{layer.n_in} → {layer.n_out}"
    for name in ("r", "channels", "d"):
        if hasattr(layer, name):
            return f"{getattr(layer, name)} → {layer.r_out}"
    return ""


def _moments(layer: nn.Module) -> int | str:
    if getattr(layer, "folded", None) is not None:
        return layer.folded.features.P
    return layer.P if hasattr(layer, "P") else ""


def _window(layer: nn.Module) -> str:
    geometry = getattr(layer, "geometry", None)
    if geometry is None:
        return ""
    text = "×".join(map(str, geometry.kernel))
    if set(geometry.stride) != {1}:
        text += f", stride {'×'.join(map(str, geometry.stride))}"
    if set(geometry.pool) != {1}:
        text += f", pool {'×'.join(map(str, geometry.pool))}"
    return text


def _dtype(layer: nn.Module) -> str:
    first = next(layer.parameters(), None)
    if first is None:
        return ""
    dtype = first.blocks.storage if hasattr(first, "blocks") else first.dtype
    return str(dtype).removeprefix("torch.")


def _bytes(layer: nn.Module) -> Iterator[int]:
    """Of everything that the layer stores, the origin of its rows and the ω of a finite layer
    among it."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        yield tensor.blocks.nbytes if hasattr(tensor, "blocks") else _nbytes(tensor)
    if hasattr(layer, "row_storage"):
        yield layer.row_storage("origin").nbytes


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _text(column: str, value: int | str) -> str:
    if isinstance(value, str):
        return value
    if column != "bytes":
        return f"{value:,}"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value} B" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
