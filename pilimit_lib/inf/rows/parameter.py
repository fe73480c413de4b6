"""Parameters of a π-layer: whole tensors to the reader, blocks of rows in memory, rows to be
appended as gradient."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...core import Blocks
from .pending import PendingRows

ROWS = ("A", "Amult", "B")  # the parameters of a layer of rows

_REMEDY = (
    "the gradient of a π-layer is a set of rows to be appended, not a number to be added to each "
    "weight. "
    "Step with pilimit_lib.inf.optim.PiSGD, clip with pilimit_lib.inf.clip.clip_grad_norm_, clear "
    "with zero_grad(); "
    "for arithmetic take a free copy: grad.clone().as_subclass(torch.Tensor)"
)


class RowGradient(Tensor):
    """`layer.A.grad`: the pending rows, to be read. Arithmetic in place would change a copy, so it
    is an error."""

    pending: PendingRows

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("detach_", "requires_grad_"):
            return args[0]
        if name == "zero_" and isinstance(args[0], cls):
            args[0].pending.clear()
            return args[0]
        if _in_place(name):
            raise RuntimeError(_REMEDY)
        return super().__torch_function__(func, types, args, kwargs or {})


class InfPiParameter(nn.Parameter):
    """A, Amult or B of a π-layer. Reads like a tensor [m, …] (as a copy); in-place operations write
    all rows.

    Registered like any parameter, so `parameters()`, groups, `requires_grad_` and freezing work as
    usual. Its own storage is
    empty: rows lie in `.blocks`. `.grad` shows the rows that the next `PiSGD.step` will append.
    """

    blocks: Blocks
    pending: PendingRows
    role: str

    def __new__(
        cls, blocks: Blocks, pending: PendingRows, role: str, requires_grad: bool = True
    ) -> InfPiParameter:
        self = super().__new__(cls, blocks.like(), requires_grad)
        self.blocks, self.pending, self.role = blocks, pending, role
        return self

    @property
    def grad(self) -> Tensor | None:
        rows = self.pending.rows()
        if rows is None:
            return None
        value = (
            torch.ones(len(rows), device=rows.A.device)
            if self.role == "Amult"
            else getattr(rows, self.role)
        )
        gradient = value.detach().clone().as_subclass(RowGradient)
        gradient.pending = self.pending
        return gradient

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise RuntimeError(_REMEDY)
        self.pending.clear()

    def refresh(self) -> None:
        """Take over the dtype and device of the blocks after a conversion; the object stays the
        same."""
        with torch._C.DisableTorchFunctionSubclass():
            self.data = self.blocks.like()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _OWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SHAPE:
            return func(
                args[0].blocks.like().new_empty(()).expand(args[0].blocks.shape),
                *args[1:],
                **kwargs,
            )
        if func == torch.Tensor.data.__get__:
            return cls(args[0].blocks, args[0].pending, args[0].role, requires_grad=False)
        if func == torch.Tensor.data.__set__:
            return args[0].blocks.write(args[1])
        if any(issubclass(kind, RowGradient) for kind in types):
            raise RuntimeError(_REMEDY)
        in_place = _in_place(getattr(func, "__name__", ""))
        if (
            in_place
            and isinstance(args[0], list | tuple)
            and any(isinstance(entry, cls) for entry in args[0])
        ):
            # several tensors at once: an optimiser's foreach, which would change copies
            raise RuntimeError(_REMEDY)
        if in_place and isinstance(args[0], cls):
            # Decoupled weight decay, say, would scale rows before it finds out that it can't use
            # their gradient.
            if args[0].pending.parts:
                raise RuntimeError(_REMEDY)
            if torch.is_grad_enabled() and args[0].requires_grad:
                raise RuntimeError(
                    "a parameter of a π-layer is changed in place while autograd records; use "
                    "torch.no_grad()"
                )
            values = args[0].blocks.dense()
            func(values, *_dense(args[1:]), **_dense(kwargs))
            args[0].blocks.write(values)
            return args[0]
        return func(*_dense(args), **_dense(kwargs))

    def __deepcopy__(self, memo: dict) -> InfPiParameter:
        if id(self) not in memo:
            memo[id(self)] = type(self)(
                copy.deepcopy(self.blocks, memo),
                copy.deepcopy(self.pending, memo),
                self.role,
                self.requires_grad,
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int):
        return type(self), (self.blocks, self.pending, self.role, self.requires_grad)

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        kind = f"{self.blocks.dtype}, {self.blocks.device}"
        return f"InfPiParameter({self.role}, {list(self.blocks.shape)}, {kind})"


def _in_place(name: str) -> bool:
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))
    )


def _dense(value: Any) -> Any:
    if isinstance(value, InfPiParameter):
        return value.blocks.dense()
    if isinstance(value, list | tuple):
        return type(value)(_dense(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _dense(entry) for key, entry in value.items()}
    return value


# What concerns the parameter as a leaf of the tape, not its values.
_OWN = {
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.requires_grad.__set__,
    torch.Tensor.requires_grad_,
    torch.Tensor.is_leaf.__get__,
    torch.Tensor.grad_fn.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.layout.__get__,
    torch.Tensor.is_cuda.__get__,
    torch.Tensor.is_cpu.__get__,
    torch.Tensor.is_sparse.__get__,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
    torch.is_complex,
    torch.Tensor.is_complex,
    torch.Tensor.get_device,
    torch.Tensor.element_size,
    torch.Tensor._backward_hooks.__get__,
    torch.Tensor._backward_hooks.__set__,
    torch.Tensor.retains_grad.__get__,
    torch.Tensor.register_hook,
}
_SHAPE = {
    torch.Tensor.shape.__get__,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.numel,
    torch.Tensor.__len__,
    torch.Tensor.dim,
    torch.Tensor.ndim.__get__,
}
