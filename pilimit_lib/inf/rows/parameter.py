"""Parameters of a π-layer: whole tensors to the reader, blocks of rows in memory, rows to be
appended as gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...core import Blocks
from ..checks import refuse_wrapping
from .pending import PendingRows
from .reading import REMEDY, RowGradient, RowsCopy, in_place

ROWS = ("A", "Amult", "B")  # the parameters of a layer of rows


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
        if role == "A":  # which stands for all three on the tape
            with torch._C.DisableTorchFunctionSubclass():
                self.requires_grad_(True)  # without it torch takes no hook
                self.register_post_accumulate_grad_hook(_accumulate)
                self.requires_grad_(requires_grad)
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
        gradient.pending, gradient.role = self.pending, self.role
        return gradient

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise RuntimeError(REMEDY)
        self.pending.clear()

    def _when_pending(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Run hook(self) whenever a backward pass has left rows: when A has got its gradient."""
        A = self.pending.layer.A
        with torch._C.DisableTorchFunctionSubclass():
            return A.register_post_accumulate_grad_hook(lambda _: hook(self))

    def refreshed(self) -> InfPiParameter:
        """This parameter with the dtype and device of the blocks after a conversion: the same
        object, but for devices (meta) where torch needs another one."""
        like = self.blocks.like()
        with torch._C.DisableTorchFunctionSubclass():
            if not torch._has_compatible_shallow_copy_type(self, like):
                return type(self)(self.blocks, self.pending, self.role, self.requires_grad)
            self.data = like
        return self

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
        if func is torch.Tensor.detach:
            refuse_wrapping(
                "A, Amult and B of a π-layer can't be made an nn.Parameter of another module, as "
                "parametrizations such as weight_norm do: their values are rows that grow; use "
                "memory='moments'"
            )
            return args[0].blocks.dense().as_subclass(RowsCopy)
        if func is torch.autograd.backward:
            return _backward(*args, **kwargs)
        if func is torch.Tensor.register_post_accumulate_grad_hook:
            return args[0]._when_pending(*args[1:], **kwargs)
        if func in _REFUSED:
            raise RuntimeError(_REFUSED[func])
        if func == torch.Tensor.data.__get__:
            return cls(args[0].blocks, args[0].pending, args[0].role, requires_grad=False)
        if func == torch.Tensor.data.__set__:
            return args[0].blocks.write(args[1])
        if any(issubclass(kind, RowGradient) for kind in types):
            raise RuntimeError(REMEDY)
        writes = in_place(getattr(func, "__name__", ""))
        several = isinstance(args[0], list | tuple) if args else False
        if writes and several and any(isinstance(entry, cls) for entry in args[0]):
            # several tensors at once: an optimiser's foreach, which would change copies
            raise RuntimeError(REMEDY)
        if writes and isinstance(args[0], cls):
            # Decoupled weight decay, say, would scale rows before it finds out that it can't use
            # their gradient.
            if args[0].pending.parts:
                raise RuntimeError(REMEDY)
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


def _backward(tensors: Any, *args: Any, inputs: Any = None, **kwargs: Any) -> None:
    """`backward(inputs=...)`: parameters of rows are named by where their gradient arrives."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    edges = []
    for entry in inputs:
        ours = isinstance(entry, InfPiParameter)
        leaf = entry.pending.layer.A if ours else entry
        with torch._C.DisableTorchFunctionSubclass():
            edges.append(torch.autograd.graph.get_gradient_edge(leaf) if ours else leaf)
    torch.autograd.backward(tensors, *args, inputs=edges, **kwargs)


def _accumulate(parameter: InfPiParameter) -> None:
    """Autograd has accumulated the empty gradient that comes with rows: the rows are pending."""
    with torch._C.DisableTorchFunctionSubclass():
        nn.Parameter.grad.__set__(parameter, None)
    parameter.pending.accumulate()


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
    torch.Tensor._post_accumulate_grad_hooks.__get__,
    torch.Tensor._post_accumulate_grad_hooks.__set__,
}
_REFUSED = {
    torch.autograd.grad: (
        "torch.autograd.grad with respect to A, Amult or B of a π-layer: that gradient is a set of "
        "rows. Call backward() and read layer.A.grad and layer.B.grad, or take derivatives with "
        "respect to inputs or other parameters; memory='moments' has ordinary parameters"
    ),
    torch.Tensor.register_hook: (
        "a hook on A, Amult or B of a π-layer would see no gradient, since that is a set of rows: "
        "register_post_accumulate_grad_hook runs when the rows are pending, and "
        "layer.pending.scale_ scales them"
    ),
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
