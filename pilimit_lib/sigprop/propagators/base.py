"""What a propagator is: a block with a rule for its two streams."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..flow import Flow
from ..streams import run_both


class Propagator(nn.Module):
    """Carries (h, t, context) through one block. A subclass defines `forward(input)` on that triple
    and returns such a triple.

    Parameters of a propagator are trained by the caller's global loss unless the class says
    otherwise (`globally_trained`). `optimizer` and `loss` are taken so that every propagator can be
    built alike; only those that learn keep them. `fuse`: run both streams through the block in one
    call: True, False, or "auto" (where the block is known to treat rows one by one).
    """

    globally_trained = True
    fuse: bool | str = "auto"
    # set by the model for each batch: which samples [b] have a label that is not ignored; None: all
    kept: Tensor | None = None

    def __init__(
        self,
        module: nn.Module | None = None,
        optimizer=None,
        loss=None,
        *,
        fuse: bool | str = "auto",
    ):
        super().__init__()
        if fuse not in (True, False, "auto"):
            raise ValueError(f"fuse is True, False or 'auto', got {fuse!r}")
        self.fuse = fuse
        if module is not None:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"{type(self).__name__} wraps an nn.Module, got {type(module).__name__}"
                )
            self.module = module

    @classmethod
    def manage(cls, manager, module: nn.Module, **options) -> Propagator:
        """Let `manager` wrap `module` in a propagator of this class."""
        return manager.add_propagator(module, cls, **options)

    def propagate(
        self, h: Tensor, t: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(h1, t1, h0, t0): both streams after the block, and what a loss compares them by."""
        h1, t1 = run_both(self.module, h, t, self.fuse)
        return h1, t1, h, t

    def targets(self, t: Tensor | None) -> Tensor | None:
        """The target stream as it enters the block."""
        return t

    def route(self, h: Tensor, t: Tensor | None, context) -> tuple:
        """What the next layer gets."""
        return Flow(h, t, context)

    def carry(self, input) -> tuple:
        """Both streams through the block and on to the next layer, without learning."""
        check_flow(input)
        h, t, context = input
        h1, t1, _, _ = self.propagate(h, self.targets(t))
        return self.route(h1, t1, context)


def propagators_in(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, Propagator]]:
    """Every propagator under `root` with its path, in the order in which it is registered."""
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, Propagator):
            yield name, module


def check_flow(input) -> None:
    """Refuse anything that is not (h, t, context), with a word on where such triples come from."""
    if not isinstance(input, tuple | list) or len(input) != 3:
        found = f"{len(input)} entries" if isinstance(input, tuple | list) else type(input).__name__
        raise TypeError(
            f"a propagator takes the triple (h, t, context), got {found}; "
            "call the whole model (sigprop.models.Forward(network, signal)) rather than its layers"
        )
