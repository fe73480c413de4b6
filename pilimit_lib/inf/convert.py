"""Checkpoints of the paper's own code to InfMLP, and back.

The original counts layers from 1 and hidden layers without the input: its L is our L + 1, its layer l our layers[l - 1].
"""
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

# The format belongs to the code that wrote it; nothing of that network is imported here.
from pilimit_orig import checkpoint

if TYPE_CHECKING:
    from .mlp import InfMLP


def read_pilimit_orig(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """The original's dictionary of a network from any file that the original wrote, or from such a dictionary, checked.

    As {1: [d r], l: [m o]}, Bs {l: [m r]}, Amult {l: [m]}, biases {l: [o]}, four alphas and layernorm. Nothing in a file is
    executed; its arrays stay in the file until they are used. Raises ValueError for what is damaged, foreign or inconsistent.
    """
    return checkpoint.checked(dict(source)) if isinstance(source, Mapping) else checkpoint.read(source)


def architecture_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the InfMLP that the original's dictionary fits."""
    As = found["As"]
    d_in, r = As[1].shape
    return {"d_in": d_in, "d_out": As[len(As)].shape[1], "r": r, "L": len(As) - 2, "layernorm": found["layernorm"],
            **{name: found[name] for name in checkpoint.ALPHAS}}


def build(net_class: type[InfMLP], source: str | os.PathLike | Mapping[str, Any], device: torch.device | str | None = None,
          dtype: torch.dtype | None = None, row_dtype: torch.dtype | None = None) -> InfMLP:
    """A network of the right shape with the weights of `source`. Rows keep the precision they were saved in, unless told."""
    found = read_pilimit_orig(source)
    kept = found["As"][len(found["As"])].dtype if row_dtype is None else row_dtype
    net = net_class(**architecture_of(found), device=device, dtype=dtype or (kept if kept == torch.float64 else None),
                    row_dtype=kept)
    load(net, found)
    return net


def load(net: InfMLP, source: str | os.PathLike | Mapping[str, Any]) -> None:
    """Give `net` the weights, alphas and layer norm of `source`; the network keeps its own dtypes and device.

    Raises ValueError, with the network as it was, where sizes do not fit.
    """
    found = read_pilimit_orig(source)
    expected = architecture_of(found)
    differing = [f"{name}: {getattr(net, name)} here, {expected[name]} in the checkpoint"
                 for name in ("d_in", "d_out", "r", "L") if getattr(net, name) != expected[name]]
    for number, layer in enumerate(net.layers, 1):
        alpha = found["last_bias_alpha" if number == len(net.layers) else "bias_alpha"]
        if number in found["As"] and (layer.bias is None) != (alpha == 0):
            differing.append(f"layers.{number - 1} has {'no bias' if layer.bias is None else 'a bias'} here, "
                             f"its multiplier in the checkpoint is {alpha:g}")
    if differing:
        raise ValueError("the checkpoint of the original code does not fit this network (InfMLP.from_pilimit_orig builds one "
                         "that fits; the original's L is L + 1 here):\n  " + "\n  ".join(differing))
    net.set_extra_state(expected)
    with torch.no_grad():
        net.layers[0].A.copy_(found["As"][1])
        for number, layer in enumerate(net.layers, 1):
            if number > 1:
                layer.set_rows(**{name: found[source][number] for name, source in
                                  (("A", "As"), ("Amult", "Amult"), ("B", "Bs"))})
            layer.bias_alpha = expected["last_bias_alpha" if number == len(net.layers) else "bias_alpha"]
            if layer.bias is not None:
                layer.bias.copy_(found["biases"][number])


def to_pilimit_orig(net: InfMLP) -> dict[str, Any]:
    """The original's dictionary of `net`, as plain tensors: what pilimit_orig.convert_net writes. Pending rows are left out."""
    layers = dict(enumerate(net.layers, 1))

    def plain(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().clone()

    rows = {layer: {name: plain(getattr(layers[layer], name).blocks.dense()) for name in ("A", "B", "Amult")}
            for layer in layers if layer > 1}
    return {**{name: getattr(net, name) for name in checkpoint.ALPHAS}, "layernorm": net.layernorm,
            "As": {1: plain(net.layers[0].A)} | {layer: held["A"] for layer, held in rows.items()},
            "Bs": {layer: held["B"] for layer, held in rows.items()},
            "Amult": {layer: held["Amult"] for layer, held in rows.items()},
            "biases": {number: plain(layer.bias) for number, layer in layers.items() if layer.bias is not None}}
