"""SGD for networks of any width: appends rows where the width is infinite, adds where it is
finite."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..rows.parameter import InfPiParameter
from .pending import gradient_of, pending_of


class PiSGD(torch.optim.SGD):
    """SGD with momentum, dampening, Nesterov and weight decay, for π-layers and ordinary parameters
    alike.

    A step on a π-layer is SGD on the function: Amult ← (1 − lr·wd)·Amult, and one row per sample is
    appended with Amult = −lr. With momentum the velocity is a function too, kept as one coefficient
    per row: a row goes on receiving −lr·μ^t. The group that lists a layer's `Amult` gives its lr,
    momentum and weight decay. Finite layers project their gradients themselves, so for them this is
    torch's SGD.

    Args:
        fused: ordinary parameters are stepped by torch's fused kernel: one pass over them, nothing
            allocated.
        on_nonfinite: what to do with a step any of whose gradients or pending rows holds NaN or
            Inf: "raise" before anything changes, or "skip" the whole of it, counted in
            `nonfinite_skipped`; pending rows are then dropped.
    """

    nonfinite_skipped = 0

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite is {on_nonfinite!r}; 'raise' or 'skip' was expected")
        how = {"maximize": maximize, "fused": fused}
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **how)
        # gradients that are not tensors have to be unscaled before the step
        self._step_supports_amp_scaling = False
        self.defaults["on_nonfinite"] = on_nonfinite
        for group in self.param_groups:
            group.setdefault("on_nonfinite", on_nonfinite)
        self._check_complete()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Append the pending rows of every π-layer, then step the other parameters as torch's SGD
        does."""
        held = self._check_complete()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [
            (group, pending)
            for group in self.param_groups
            for pending in pending_of(group["params"])
        ]
        if held:
            self._check_unspent(held)
        for group, pending in ready:
            buffer = self.state.get(pending.parameter, {}).get("momentum_buffer")
            pending.check(group["momentum"], buffer)
        if not self._finite():
            for _, pending in ready:
                pending.clear()
            return loss
        for group, pending in ready:
            sign = -1 if group["maximize"] else 1
            lr, decay = sign * float(group["lr"]), sign * group["weight_decay"]
            velocity = partial(self._velocity, pending.parameter, group, decay)
            pending.apply(lr, decay, velocity if group["momentum"] else None)
        if held:
            spent = weakref.ref(self), self._ordinary_gradients()
            for _, pending in ready:
                pending.spent = spent
        # Rows are no longer pending, so torch's SGD finds no gradient on π-layers and passes them
        # over. Unwrapped, because its wrapper would run the hooks of this optimiser a second time.
        inspect.unwrap(torch.optim.SGD.step)(self)
        return loss

    def _check_complete(self) -> list[InfPiParameter]:
        """The parameters of π-layers that are rows; raises where a layer is not held as a whole."""
        held = [
            p
            for group in self.param_groups
            for p in group["params"]
            if isinstance(p, InfPiParameter)
        ]
        stepped = {id(p.pending) for p in held if p.role == "Amult"}
        for parameter in held:
            if id(parameter.pending) not in stepped:
                raise ValueError(
                    f"the optimiser was given {parameter.role} of a π-layer but not its Amult, to "
                    "which the "
                    "learning rate applies; list layer.A, layer.Amult and layer.B, or use "
                    "param_groups(net, lr)"
                )
        return held

    def _check_unspent(self, held: list[InfPiParameter]) -> None:
        """Raise where rows were appended by a step with the same gradients as this one: ordinary
        parameters would be stepped a second time, and these not."""
        mine = self._ordinary_gradients()
        for parameter in held:
            pending = parameter.pending
            if pending or pending.spent is None:
                continue
            stepper, theirs = pending.spent
            same = any(g() is h() and version == v for g, version in theirs for h, v in mine)
            if same or not (theirs or mine or stepper() in (None, self)):
                raise RuntimeError(
                    f"the rows of {pending.layer} were appended already, by an earlier step of "
                    "this optimiser or by another one that holds the layer too, and can't be "
                    "appended twice: call zero_grad() after each step, and give every layer to one "
                    "optimiser"
                )

    def _ordinary_gradients(self) -> list[tuple[weakref.ref, int]]:
        """The gradients that torch keeps, and their versions, by which they are known again."""
        parameters = (p for group in self.param_groups for p in group["params"])
        grads = (p.grad for p in parameters if not hasattr(p, "pending"))
        return [(weakref.ref(grad), grad._version) for grad in grads if grad is not None]

    def _finite(self) -> bool:
        """Whether the step may be made; NaN or Inf in any group raises, or is counted as a step to
        be skipped."""
        groups = self.param_groups
        if _all_finite([p for group in groups for p in group["params"]]):
            return True
        bad = [group for group in groups if not _all_finite(group["params"])]
        if any(group.get("on_nonfinite", "raise") == "raise" for group in bad):
            raise FloatingPointError(
                "NaN or Inf in a gradient or in rows to be appended (for rows in float16: more "
                "than 65504); "
                "rows can't be taken back, so nothing was stepped. Lower the learning rate or "
                "clip, or keep "
                "rows in bfloat16; zero_grad() to go on, or PiSGD(on_nonfinite='skip')"
            )
        self.nonfinite_skipped += bool(bad)
        return not bad

    def _velocity(
        self, parameter: InfPiParameter, group: dict[str, Any], decay: float, count: int
    ) -> Tensor:
        """What this step adds to every row, in units of −lr: [old rows + count]; keeps the velocity
        in the state."""
        amult = parameter.blocks.dense()
        gradient = torch.cat([decay * amult, amult.new_ones(count)])
        state = self.state[parameter]
        velocity = state.get("momentum_buffer")
        if velocity is None:
            velocity = gradient.clone()
        else:
            velocity = torch.cat([velocity.to(amult), amult.new_zeros(count)]).mul_(
                group["momentum"]
            )
            velocity.add_(gradient, alpha=1 - group["dampening"])
        state["momentum_buffer"] = velocity
        return gradient.add(velocity, alpha=group["momentum"]) if group["nesterov"] else velocity


SMALL = 4096  # entries


def _all_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether no gradient, nor pending row, of `parameters` holds NaN or Inf; what several share
    counts with the one that leads."""
    tensors = [
        tensor
        for parameter in parameters
        if (gradient := gradient_of(parameter)) is not None
        and getattr(gradient, "parameter", parameter) is parameter
        for tensor in gradient.tensors()
    ]
    # A sum takes one pass and no memory, and isn't finite where an entry isn't; of large numbers it
    # may overflow by itself. Small tensors are summed together: what they take is calls.
    devices = {tensor.device for tensor in tensors}
    small = [tensor.reshape(-1) for tensor in tensors if tensor.numel() <= SMALL]
    joined = [torch.cat(small)] if len(small) > 1 and len(devices) == 1 else small
    large = [tensor for tensor in tensors if tensor.numel() > SMALL]
    sums = [tensor.sum() for tensor in joined + large]
    if all(device.type == "cpu" for device in devices):
        finite = all(math.isfinite(total.item()) for total in sums)
    else:
        there = tensors[0].device
        finite = bool(torch.stack([total.isfinite().to(there) for total in sums]).all())
    return finite or all(bool(tensor.isfinite().all()) for tensor in tensors)


InfSGD = PiSGD  # the name in the original's experiments
