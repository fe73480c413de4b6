"""Files as the original code wrote them, made without it: its modules exist only while torch.save
runs."""

import contextlib
import pickle
import sys
import types

import torch

from pilimit_orig.checkpoint import ALPHAS


class _Attributes:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@contextlib.contextmanager
def original_modules(array_module="inf.dynamicarray"):
    """(InfPiMLP, DynArr) under the names of the original's modules, gone afterwards."""
    net = type("InfPiMLP", (_Attributes,), {"__module__": "inf.pimlp"})
    arr = type("DynArr", (_Attributes,), {"__module__": array_module})
    made = {name: types.ModuleType(name) for name in ("inf", "inf.pimlp", array_module)}
    made["inf.pimlp"].InfPiMLP, made[array_module].DynArr = net, arr
    assert not set(made) & set(sys.modules)
    sys.modules.update(made)
    try:
        yield net, arr
    finally:
        for name in made:
            del sys.modules[name]


def _grown(arr, tensor):
    """A growing array whose buffer is longer than what counts, its rest not a number."""
    buffer = torch.cat(
        [tensor, tensor.new_full((len(tensor) + 3, *tensor.shape[1:]), float("nan"))]
    )
    return arr(
        d=tensor.shape[-1] if tensor.dim() > 1 else None,
        device="cpu",
        resizemult=2,
        arr=buffer,
        size=len(tensor),
    )


def _fields(net, arr):
    fields = {name: getattr(net, name) for name in (*ALPHAS, "layernorm")}
    fields["As"] = {l: a if l == 1 else _grown(arr, a) for l, a in net.As.items()}
    for name in ("Bs", "Amult"):
        fields[name] = {l: _grown(arr, a) for l, a in getattr(net, name).items()}
    fields["biases"] = dict(net.biases) or None
    return fields


def save_object(net, path, zipped=True, **extra):
    """torch.save of the whole object, with leftovers of training."""
    with original_modules() as (cls, arr):
        leftovers = {
            "d": net.d,
            "dout": net.dout,
            "r": net.r,
            "L": net.L,
            "device": torch.device("cpu"),
            "arrbackend": arr,
            "dAs": {1: None, 2: [torch.ones(2, net.r)]},
            "X": torch.ones(1, net.d),
            "gs": {1: torch.ones(1, net.r)},
        }
        torch.save(
            cls(**(leftovers | _fields(net, arr) | extra)),
            path,
            _use_new_zipfile_serialization=zipped,
        )


def save_legacy(net, path, with_pickle=False):
    """The older dictionary, whose arrays were pickled under the module name dynamicarray."""
    with original_modules("dynamicarray") as (_, arr):
        fields = _fields(net, arr)
        if with_pickle:
            with open(path, "wb") as file:
                pickle.dump(fields, file)
        else:
            torch.save(fields, path, _use_new_zipfile_serialization=False)
