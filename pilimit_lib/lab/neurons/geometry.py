"""Geometry of the layers that have neurons: which dimension counts them, in the weight and in the
output."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import NotFound

LAYER_TYPES = (nn.Linear, _ConvNd)

# The attributes in which modules repeat the sizes of their tensors; they have to follow every edit.
SIZE_ATTRIBUTES = (
    (nn.Linear, ("in_features", "out_features")),
    (_ConvNd, ("in_channels", "out_channels", "groups")),
    (nn.modules.batchnorm._NormBase, ("num_features",)),
    (nn.PReLU, ("num_parameters",)),
    (nn.Embedding, ("embedding_dim",)),
)


def is_layer(module: nn.Module) -> bool:
    """Whether the module has neurons in the lab's sense: a linear or (transposed) convolution
    layer."""
    return isinstance(module, LAYER_TYPES)


def neuron_count(layer: nn.Module) -> int:
    """Output features or output channels."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def incoming_count(layer: nn.Module) -> int:
    """Length of the weight's input dimension: input features, or input channels per group."""
    return layer.weight.shape[incoming_dim(layer)]


def neuron_dim(layer: nn.Module) -> int:
    """The dimension of `layer.weight` that counts neurons."""
    return 1 if isinstance(layer, _ConvTransposeNd) and not is_depthwise(layer) else 0


def incoming_dim(layer: nn.Module) -> int:
    """The dimension of `layer.weight` that counts what comes in."""
    return 1 - neuron_dim(layer)


def is_depthwise(layer: nn.Module) -> bool:
    """One filter per channel: its neurons are those of the layer below."""
    return (
        isinstance(layer, _ConvNd)
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.groups > 1
    )


def spatial_dims(layer: nn.Module) -> int:
    """Trailing dimensions of the output behind the neurons: 0 for linear, 2 for Conv2d."""
    return 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)


def size_attributes(module: nn.Module) -> dict[str, int]:
    """The sizes that the module repeats in attributes, by attribute name."""
    return {
        name: getattr(module, name)
        for kind, names in SIZE_ATTRIBUTES
        if isinstance(module, kind)
        for name in names
    }


def indices(wanted: Iterable[int], size: int, what: str) -> list[int]:
    """`wanted` as a sorted list, after checking that each is a position below `size`."""
    if isinstance(wanted, int):
        wanted = [wanted]
    found = list(wanted)
    strange = [i for i in found if isinstance(i, bool) or not hasattr(i, "__index__")]
    if strange:
        raise TypeError(f"{what} are counted by integers, got {strange[:5]}")
    found = sorted({int(i) for i in found})
    missing = [i for i in found if not 0 <= i < size]
    if missing:
        raise NotFound(f"no such {what}: {missing[:10]}; they are counted from 0 to {size - 1}")
    return found
