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
    otherwise (`globally_trained`).
    """

    globally_trained = True
    fuse: bool | str = "auto"

    def __init__(self, module: nn.Module | None = None):
        super().__init__()
        if module is not None:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"{type(self).__name__} wraps an nn.Module, got {type(module).__name__}"
                )
            self.module = module

    def propagate(
        self, h: Tensor, t: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(h1, t1, h0, t0): both streams after the block, and what a loss compares them by."""
        h1, t1 = run_both(self.module, h, t, self.fuse)
        return h1, t1, h, t

    def route(self, h: Tensor, t: Tensor | None, context) -> tuple:
        """What the next layer gets."""
        return Flow(h, t, context)


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
