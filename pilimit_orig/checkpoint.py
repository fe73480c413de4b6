"""Checkpoints of the original code as one plain dictionary, whichever of its three forms they have.

    a whole pickled network (torch.save(net))
    a pickled dictionary whose arrays are DynArr
    what convert_net writes

The dictionary: first_layer_alpha, last_layer_alpha, bias_alpha, last_bias_alpha (float), layernorm
(bool) and, by layer from 1, As {1: [d r], l: [M r], L+1: [M dout]}, Bs {l: [M r]}, Amult {l: [M]},
biases {l: [o]} (empty without biases).
"""

import os

import torch

from pilimit_orig.stored import CheckpointError, StoredTensor
from pilimit_orig.unpickle import DynArrRecord, InfPiMLPRecord, read_object

ALPHAS = ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")
ARRAYS = ("As", "Bs", "Amult", "biases")


def read(path):
    """The dictionary above from a file, without executing anything in it.

    Dtypes stay as saved. Tensors of a zip file (torch since 1.6) lie in the file until they are
    used; those of older ones are read. CheckpointError (a ValueError) names what is wrong.
    """
    path = os.fspath(path)
    try:
        return checked(read_object(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; nothing in it was executed") from error


def checked(found):
    """The dictionary above from a Record or a dictionary of tensors, after every shape has been
    compared with every other."""
    fields = found.fields if isinstance(found, InfPiMLPRecord) else found
    if not isinstance(fields, dict):
        raise CheckpointError(
            "expected a network of the original code or its dictionary, found a "
            f"{type(found).__name__}"
        )
    missing = [name for name in (*ALPHAS, "layernorm", *ARRAYS) if name not in fields]
    if missing:
        held = ", ".join(map(str, list(fields)[:6])) or "nothing"
        raise CheckpointError(
            f"not a checkpoint of the original code: {', '.join(missing)} missing; found {held}"
        )
    out = {name: _alpha(name, fields) for name in ALPHAS}
    if not isinstance(fields["layernorm"], bool | int):
        raise CheckpointError(
            f"layernorm is a {type(fields['layernorm']).__name__}, not True or False"
        )
    out["layernorm"] = bool(fields["layernorm"])
    arrays = {name: _layers(name, fields[name]) for name in ARRAYS}
    sizes = _compare(
        {
            name: {l: _shape(f"{name}[{l}]", a) for l, a in layers.items()}
            for name, layers in arrays.items()
        },
        out,
    )
    for name, layers in arrays.items():
        out[name] = {
            l: _open(a)
            for l, a in sorted(layers.items())
            if name != "biases" or sizes["biases"].get(l)
        }
    return out


def _alpha(name, fields):
    value = fields[name]
    if name == "last_bias_alpha" and value is None:
        value = fields["bias_alpha"]  # the original's own default
    if isinstance(value, StoredTensor) and value.size == ():
        value = value.open()
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) < float("inf")
    ):
        raise CheckpointError(f"{name} is {value!r:.40}, not a finite number")
    return float(value)


def _layers(name, found):
    if found is None and name == "biases":
        return {}
    if not isinstance(found, dict) or not all(isinstance(l, int) for l in found):
        raise CheckpointError(
            f"{name} is a {type(found).__name__}, not a dictionary from layer numbers to arrays"
        )
    # A layer's bias is None where its multiplier is zero.
    return {l: a for l, a in found.items() if not (a is None and name == "biases")}


def _shape(name, array):
    """Shape of the valid part of an array: of a DynArr its first `size` rows."""
    if isinstance(array, DynArrRecord):
        buffer, rows = array.fields.get("arr"), array.fields.get("size")
        if (
            not isinstance(buffer, StoredTensor)
            or isinstance(rows, bool)
            or not isinstance(rows, int)
            or not buffer.size
            or not 0 <= rows <= buffer.size[0]
        ):
            raise CheckpointError(
                f"{name} is a growing array that says it has {rows!r:.40} rows, "
                f"its buffer {getattr(buffer, 'size', 'is missing')}"
            )
        array, shape = buffer, (rows, *buffer.size[1:])
    elif isinstance(array, StoredTensor | torch.Tensor):
        shape = tuple(array.shape)
    else:
        raise CheckpointError(f"{name} is a {type(array).__name__}, not an array")
    dtype = array.storage.dtype if isinstance(array, StoredTensor) else array.dtype
    if not dtype.is_floating_point:
        raise CheckpointError(f"{name} holds {dtype}, not floating-point numbers")
    return shape


def _open(array):
    if isinstance(array, DynArrRecord):
        return array.fields["arr"].open(rows=array.fields["size"])
    return array.open() if isinstance(array, StoredTensor) else array.detach()


def _compare(shapes, alphas):
    """Every shape against those it must agree with; returns the shapes."""
    As, L = shapes["As"], len(shapes["As"]) - 1
    if sorted(As) != list(range(1, L + 2)) or L < 1:
        raise CheckpointError(
            f"As has the layers {sorted(As)}, expected 1, 2, … without gaps and at least two"
        )
    for name in ("Bs", "Amult"):
        if sorted(shapes[name]) != list(range(2, L + 2)):
            raise CheckpointError(
                f"{name} has the layers {sorted(shapes[name])}, expected 2 to {L + 1} as in As"
            )
    if len(As[1]) != 2 or len(As[L + 1]) != 2:
        raise CheckpointError(
            f"As[1] has shape {As[1]} and As[{L + 1}] {As[L + 1]}, expected [d, r] and [rows, "
            "outputs]"
        )
    r, dout = As[1][1], As[L + 1][1]
    for l in range(2, L + 2):
        rows, width = As[l][0] if As[l] else 0, dout if l == L + 1 else r
        for name, expected in {"As": (rows, width), "Bs": (rows, r), "Amult": (rows,)}.items():
            if shapes[name][l] != expected:
                raise CheckpointError(
                    f"{name}[{l}] has shape {shapes[name][l]}, expected {expected} "
                    f"({rows} rows, rank {r}, {dout} outputs)"
                )
    for l, shape in shapes["biases"].items():
        if not 1 <= l <= L + 1 or shape != ((dout,) if l == L + 1 else (r,)):
            raise CheckpointError(
                f"biases[{l}] has shape {shape}, expected ({dout if l == L + 1 else r},)"
            )
    needed = [
        l for l in range(1, L + 2) if alphas["last_bias_alpha" if l == L + 1 else "bias_alpha"] != 0
    ]
    if absent := [l for l in needed if l not in shapes["biases"]]:
        raise CheckpointError(f"layers {absent} have no bias, though their multiplier is not zero")
    return shapes


def write(checkpoint, path):
    """Writes the dictionary as plain tensors, whole or not at all; it loads with
    torch.load(weights_only=True)."""

    # A slice would be saved with the whole of its buffer.
    def plain(tensor):
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()

    out = {
        name: {l: plain(a) for l, a in value.items()} if name in ARRAYS else value
        for name, value in checkpoint.items()
    }
    path = os.fspath(path)
    beside = f"{path}.{os.getpid()}.part"
    try:
        torch.save(out, beside)
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)


def describe(checkpoint):
    """One line per layer: shapes and types."""
    L = len(checkpoint["As"]) - 1
    head = (
        f"L={L} stages of ReLU units (the library's L={L - 1}, --depth {L - 1}), "
        f"layernorm={checkpoint['layernorm']}, "
        + ", ".join(f"{name}={checkpoint[name]:g}" for name in ALPHAS)
    )
    layers = [
        f"  layer {l}: A {list(a.shape)} {str(a.dtype).split('.')[1]}"
        + (", bias" if l in checkpoint["biases"] else "")
        for l, a in checkpoint["As"].items()
    ]
    return "\n".join([head, *layers])


__all__ = ["CheckpointError", "checked", "describe", "read", "write"]
