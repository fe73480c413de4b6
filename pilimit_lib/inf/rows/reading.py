"""Tensors that show what a π-layer keeps elsewhere: its rows, and the rows that are pending.

Both are copies, to be read. What would change one of them in place is an error, since the layer
would stay as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pending import PendingRows

REMEDY = (
    "the gradient of a π-layer is a set of rows to be appended, not a number to be added to each "
    "weight. "
    "Step with pilimit_lib.inf.optim.PiSGD, clip with pilimit_lib.inf.clip.clip_grad_norm_, clear "
    "with zero_grad(); "
    "for arithmetic take a free copy: grad.clone().as_subclass(torch.Tensor)"
)
_NORMS = ("norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "_foreach_norm")


class RowsCopy(Tensor):
    """What `detach()` of A, Amult or B gives: a tensor of its own. To write the rows of one layer
    into it, as averages of weights do, would leave the layer that it came from as it is."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        copies = [isinstance(entry, cls) for argument in args for entry in entries(argument)]
        if in_place(name) and sum(copies) > 1:
            raise RuntimeError(
                "rows of a π-layer are to be written into detach() of another's, which is a copy: "
                "the layer would stay as it is. Averages of weights (swa_utils) can't be made of "
                "rows, whose number grows; average a network of memory='moments' "
                "(net.to_moments()). To write rows: `.data`, or layer.set_rows"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if name in ("detach", "to") else result

    def __reduce_ex__(self, protocol: int):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class RowGradient(Tensor):
    """`layer.A.grad`: the pending rows."""

    pending: PendingRows
    role: str

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("detach_", "requires_grad_"):
            return args[0]
        if name == "zero_" and isinstance(args[0], cls):
            args[0].pending.clear()
            return args[0]
        if name == "_amp_foreach_non_finite_check_and_unscale_":
            return _unscale(*args)
        if in_place(name):
            raise RuntimeError(REMEDY)
        if name in _NORMS:
            raise RuntimeError(
                "the rows of A, Amult and B are one gradient together, whose size is that of the "
                "function they add: layer.pending.norm(), or "
                "pilimit_lib.inf.clip.clip_grad_norm_(net, math.inf) for all parameters. The norm "
                "of one of the three alone means nothing"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


def _unscale(gradients: list[Tensor], found_inf: Tensor, factor: Tensor) -> None:
    """What GradScaler asks for: multiply gradients, and say whether any was not finite. The rows of
    a layer count once, with their A."""
    plain = [gradient for gradient in gradients if not isinstance(gradient, RowGradient)]
    if plain:
        torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, factor)
    for gradient in gradients:
        if isinstance(gradient, RowGradient) and gradient.role == "A":
            finite = [tensor.isfinite().all() for tensor in gradient.pending.tensors()]
            found_inf.logical_or_(~torch.stack(finite).all())
            gradient.pending.scale_(factor)


def in_place(name: str) -> bool:
    """Whether a function of torch with this name changes its first argument."""
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    )


def entries(value: object) -> list | tuple:
    """The tensors of a first argument, which may be a list of them."""
    return value if isinstance(value, list | tuple) else (value,)
