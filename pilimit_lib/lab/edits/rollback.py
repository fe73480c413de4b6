"""The way back from an edit, and carrying one out so that it either holds or never was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core import Change, Growable, follow, restore, snapshot
from ..errors import Refused
from ..neurons.counters import Neurons
from ..neurons.geometry import size_attributes
from ..neurons.tracked import TrackedNetwork, undisturbed
from ..run.session import Session
from .plan import Plan
from .surgery import carry_out

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative; planning errors are of order one


class Rollback:
    """What model, counters, rates, optimiser and age are at this moment, to go back to bit for bit.

    Edits replace tensors and never write into old ones, so references suffice where an edit fails:
    going back is exact, down to the identity of the parameters. Training writes in place, so the
    values are kept as well where the session can undo.
    """

    def __init__(self, session: Session) -> None:
        root, optimizer = session.module, session.optimizer
        values = session.undo_depth > 0 and not session.editing
        modules = [m for top in (root, *session.neurons.values()) for m in top.modules()]
        self.modules = [
            (m, dict(m._parameters), dict(m._buffers), size_attributes(m)) for m in modules
        ]
        self.flags = [(p, p.requires_grad, p.grad) for p in root.parameters()]
        self.counters = [
            (m, {name: b.clone() for name, b in m._buffers.items()})
            for m in modules
            if isinstance(m, Neurons)
        ]
        held = [] if optimizer is None else optimizer.param_groups
        self.groups = [{**group, "params": list(group["params"])} for group in held]
        state = {} if optimizer is None else optimizer.state
        self.state = {parameter: dict(entry) for parameter, entry in state.items()}
        self.values: list[tuple[Tensor, Tensor]] = []
        self.snapshot: dict[str, Any] | None = None
        if values and any(isinstance(m, Growable) for m in modules):
            self.snapshot = snapshot(root, optimizer)  # such a module comes back its own way
        elif values:
            entries = [
                value for entry in (*self.groups, *state.values()) for value in entry.values()
            ]
            tensors = [t for t in entries if isinstance(t, Tensor)]
            tensors = [*root.parameters(), *root.buffers(), *tensors]
            self.values = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self.age, self.steps = session.age, session.steps

    def check(self, session: Session) -> None:
        """Raise where the model or the optimiser is no longer made of what it was made of."""
        now = {*session.module.modules(), *session.neurons.values()}
        groups = [] if session.optimizer is None else session.optimizer.param_groups
        same = self.snapshot is not None or now == {module for module, *_ in self.modules}
        if not same or len(groups) != len(self.groups):
            raise ValueError(
                "modules or parameter groups were replaced since the edit, which therefore cannot "
                "be undone; load a checkpoint"
            )

    @torch.no_grad()
    def restore(self, session: Session) -> None:
        """Put everything back."""
        for tensor, value in self.values:
            if not torch.equal(tensor, value.to(tensor.device)):  # see `undisturbed`
                tensor.copy_(value)
        for module, parameters, buffers, sizes in self.modules:
            for name, held in buffers.items():
                now = module._buffers.get(name)
                # the model may have been moved since, and then its buffers are new tensors
                module._buffers[name] = held if now is None or held is None else held.to(now.device)
            module._parameters.update(parameters)
            for name, size in sizes.items():
                setattr(module, name, size)
        for parameter, learning, gradient in self.flags:
            parameter.requires_grad_(learning).grad = gradient
        for neurons, values in self.counters:
            neurons.load(values)
        if session.optimizer is not None:
            for group, kept in zip(session.optimizer.param_groups, self.groups):
                group.update(kept)
            session.optimizer.state.clear()
            session.optimizer.state.update(self.state)
        if self.snapshot is not None:
            restore(session.module, self.snapshot, session.optimizer)
        session.age, session.steps = self.age, self.steps
        if isinstance(session.module, TrackedNetwork):
            session.module.__dict__["_age"] = self.age
        session.forget_plans()


def remember(session: Session, summary: str, before: Rollback) -> None:
    """Let `undo` go back to before an edit that has succeeded; the oldest memory falls away."""
    past = [*session.past, (summary, before)]
    session.past = past[max(0, len(past) - session.undo_depth) :]


def apply(plan: Plan, session: Session) -> Change:
    """Carry the plan out. On any error model, counters and optimiser are the very objects that they
    were."""
    example, before = session.example(), Rollback(session)
    expected = _expected(plan, session.module, example)
    try:
        change = carry_out(plan.steps)
        if plan.finish is not None:
            plan.finish()
        _check(plan, session.module, example, expected)
        if session.optimizer is not None:
            follow(session.optimizer, change)
    except BaseException:
        before.restore(session)
        raise
    session.forget_plans()
    if not session.editing:
        remember(session, plan.summary, before)
    session.note("edit", what=plan.summary)
    return change


def _expected(plan: Plan, model: nn.Module, example: tuple) -> list[Tensor] | None:
    """What the network says now, with what the edit takes away masked out of every consumer."""
    if plan.preserves is None:
        return None
    masked: dict[str, Tensor] = {}
    for tie in plan.coupling.columns() if plan.preserves == "masked" else ():
        weight = masked.get(tie.label, getattr(tie.module, tie.name).detach().clone())
        gone = tie.positions[list(plan.removed)].flatten().to(weight.device)
        masked[tie.label] = weight.index_fill_(tie.dim, gone, 0)
    return _answers(model, example, masked)


def _answers(model: nn.Module, example: tuple, replaced: dict[str, Tensor]) -> list[Tensor]:
    """What the model says about the example, with some parameters replaced for this one call."""
    with undisturbed(model), torch.no_grad():
        if replaced:
            return tensors_in(torch.func.functional_call(model, replaced, example))
        return tensors_in(model(*example))


def tensors_in(value: Any) -> list[Tensor]:
    """Every floating-point tensor in what a model returned, whatever it is packed in."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    if not isinstance(value, list | tuple):
        return []
    return [tensor for entry in value for tensor in tensors_in(entry)]


def _check(plan: Plan, model: nn.Module, example: tuple, expected: list[Tensor] | None) -> None:
    try:
        found = _answers(model, example, {})
    except Exception as error:
        raise Refused(
            f"{plan.summary}: the forward pass no longer runs on the example batch "
            f"({type(error).__name__}: {error}); it probably names a size (a view or split with "
            "fixed numbers). Nothing was changed"
        ) from error
    if expected is None:
        return
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        raise Refused(
            f"{plan.summary}: the neurons reach the output of the model, whose shape would change "
            f"from {[list(t.shape) for t in expected]} to {[list(t.shape) for t in found]}; "
            "pass allow_output=True if that is meant. Nothing was changed"
        )
    for new, old in zip(found, expected):
        if not old.numel():
            continue
        apart, scale = float((new - old).abs().max()), float(old.abs().max())
        bound = TOLERANCE.get(old.dtype, 3e-2) * max(scale, 1e-6)
        if not apart <= bound and torch.isfinite(old).all():
            raise Refused(
                f"{plan.summary}: the edited network differs from what it should compute by "
                f"{apart:.3g} on the example batch; something between this layer and its consumers "
                "mixes neurons (a mean or softmax over them, a shuffle), so the edit is refused. "
                "Nothing was changed"
            )
