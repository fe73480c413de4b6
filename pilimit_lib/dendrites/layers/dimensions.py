"""Where a layer's neurons are in its output, and errors that say how to put it right."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations as kind_of

from .initial import is_norm

CONVS = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}

LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.RNN,
    nn.GRU,
    nn.LSTM,
    nn.RNNCell,
    nn.GRUCell,
    nn.LSTMCell,
    nn.Embedding,
    nn.TransformerEncoderLayer,
)
SAME = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.Dropout,
    nn.Dropout2d,
)


class DimensionError(ValueError):
    """A layer's output does not have the dimensions that it was said to have."""


def along(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector [n] shaped to multiply along dimension ``axis`` of ``like``, in its dtype."""
    return vector.to(like.dtype).view([1] * axis + [-1] + [1] * (like.dim() - axis - 1))


def _last_of(block: nn.Module) -> nn.Module | None:
    """The layer that settles where the neurons of a block's output are: the last one, past
    activations and norms."""
    if not isinstance(block, nn.Sequential):
        return block
    last = (m for m in reversed(block) if not is_norm(m) and kind_of(m) not in SAME)
    return next((_last_of(m) for m in last), None)


def known_dims(neuron: nn.Module, default) -> tuple[int, ...] | None:
    """The dimensions before anyone set them for this layer, or None to find out at the first
    forward pass.

    As configured; but Linear layers have their neurons last, whatever the rank where the default
    says so too ([-1, -1, 0] in transformers), and are [-1, 0] beside convolutions.
    """
    if default is None:
        return None
    if kind_of(_last_of(neuron)) is not nn.Linear:
        return tuple(default)
    return None if default[-1] == 0 else (-1, 0)


def known_neurons(neuron: nn.Module) -> int | None:
    """How many neurons a Linear or Conv layer has; None where only a forward pass tells."""
    if kind_of(neuron) is nn.Linear:
        return neuron.out_features
    return neuron.out_channels if kind_of(neuron) in CONVS else None


def found_dims(neuron: nn.Module, ndim: int) -> tuple[int, ...] | None:
    """The dimensions of an output of that rank, where the kind of layer settles them."""
    kind = kind_of(_last_of(neuron))
    if kind in LAST:
        axis = ndim - 1
    elif kind in CONVS:
        axis = ndim - 1 - CONVS[kind]
    else:
        return None
    return tuple(0 if d == axis else -1 for d in range(ndim)) if axis >= 0 else None


def check_output(layer, y) -> bool:
    """Whether y can be combined with dendrites; sets dims and neurons on the first forward, raises
    on a mismatch."""
    if not isinstance(y, Tensor):
        kind = type(layer.neuron).__name__
        raise TypeError(
            f"layer '{layer.name}' ({kind}) returned a {type(y).__name__}, but dendrites need one "
            "tensor. Give it a processor: "
            f'DendriteConfig(processors={{"{kind}": MultiOutputProcessor}}), or '
            f"GPA.pc.append_module_names_with_processing(['{kind}']) and "
            "GPA.pc.append_module_by_name_processing_classes([PBM.MultiOutputProcessor]) before "
            "the conversion"
        )
    if layer.dims is None:
        layer.dims = found_dims(layer.neuron, y.dim())
    problem = _problem(layer, y)
    if problem is None:
        layer.neurons = y.shape[layer.axis]
        return True
    if not layer.config.debug_dims:
        raise DimensionError(problem)
    if layer.dimension_error is None:
        layer.dimension_error = problem
    return False


def raise_dimension_errors(layers: Iterable) -> None:
    """Raise what debugging mode (``debug_dims``) has collected, all layers at once."""
    wrong = [layer for layer in layers if layer.dimension_error is not None]
    if not wrong:
        return
    problems = "\n".join(f"  {layer.dimension_error}" for layer in wrong)
    for layer in wrong:
        layer.dimension_error = None
    raise DimensionError(f"{len(wrong)} layers have wrong dimensions:\n{problems}")


def _problem(layer, y: Tensor) -> str | None:
    dims, shape = layer.dims, list(y.shape)
    who = f"layer '{layer.name}' ({type(layer.neuron).__name__}) returned a tensor of shape {shape}"
    axis = _likely_axis(layer.neuron, y)
    likely = [0 if d == axis else -1 for d in range(y.dim())]
    call = f"model{layer.path}.set_this_input_dimensions({likely})"
    remedy = f"call {call} after the conversion, with the 0 where its neurons are"
    if dims is None:
        return f"{who}, and nothing says which dimension its neurons are; {remedy}"
    if len(dims) != y.dim():
        return (
            f"{who} ({y.dim()} dimensions), but its dimensions are set to {list(dims)} "
            f"({len(dims)}); {remedy}"
        )
    if layer.neurons is not None and layer.neurons != y.shape[dims.index(0)]:
        return (
            f"{who}, but {layer.neurons} neurons were expected in dimension {dims.index(0)} "
            f"(dimensions {list(dims)}); {remedy}"
        )
    return None


def _likely_axis(neuron: nn.Module, y: Tensor) -> int:
    """The axis to suggest: that of a Linear or Conv layer, else the only one (not the batch) as
    long as some weight has rows, else the last."""
    found = found_dims(neuron, y.dim())
    if found is not None:
        return found.index(0)
    rows = {p.shape[0] for p in neuron.parameters() if p.dim()} | {
        getattr(neuron, "hidden_size", -1)
    }
    matches = [d for d in range(1, y.dim()) if y.shape[d] in rows]
    return matches[0] if len(matches) == 1 else y.dim() - 1
