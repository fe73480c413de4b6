"""One switch for the implementations of the sums that layers are made of.

    rows       plain      the semantics, in plain torch
               chunked    the same for a CPU's caches, any dtype and device; the default
               native     C++ for a CPU, compiled at the first use
               triton     Triton for CUDA
    moments    plain      the semantics, in plain torch; the default, also of ConvNets
               native     C++ for a CPU, compiled at the first use; degrees up to 2, not of ConvNets
               triton     Triton for CUDA; degrees up to 2

Those that are no default have to be asked for: `native` needs a compiler, `triton` a GPU. One that
can't run (dtype, device, size) gives way to the next simpler one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

CHOICES = {
    "rows": ("plain", "chunked", "native", "triton"),
    "moments": ("plain", "native", "triton"),
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """What was asked for, and with `debug` the lines that tell what ran."""

    rows: str = "chunked"
    moments: str = "plain"
    debug: bool = False
    seen: list[str] = field(default_factory=list)

    def tell(self, line: str) -> None:
        """Note what ran or why something refused, once, where it was asked for."""
        if self.debug and line not in self.seen:
            self.seen.append(line)
            logger.warning("sums of a π-layer: %s", line)


_DEFAULT = Implementation()
_chosen: ContextVar[Implementation] = ContextVar("pilimit_implementation", default=_DEFAULT)


def chosen() -> Implementation:
    """What the surrounding `with` asks for, or the defaults."""
    return _chosen.get()


@contextmanager
def implementation(
    rows: str | None = None, moments: str | None = None, debug: bool | None = None
) -> Iterator[list[str]]:
    """Inside the `with`, forward passes use these implementations; what is None stays as it is.

    The backward pass of rows uses that of the forward pass; moments are summed as is said where
    `backward` is called. With `debug`, the list that the `with` yields tells which ran and why
    others refused, one line per new reason; the same lines go to the logger of this module.
    """
    wanted = {"rows": rows, "moments": moments}
    for kind, name in wanted.items():
        if name is not None and name not in CHOICES[kind]:
            raise ValueError(
                f"there is no implementation {name!r} of {kind}; choose one of "
                f"{', '.join(CHOICES[kind])}"
            )
    changes = {kind: name for kind, name in wanted.items() if name is not None}
    if debug is not None:
        changes |= {"debug": debug, "seen": []}
    choice = replace(chosen(), **changes)
    token = _chosen.set(choice)
    try:
        yield choice.seen
    finally:
        _chosen.reset(token)


def row_twin(name: str = "chunked", debug: bool = False):
    """`implementation(rows=name)` under its older name."""
    return implementation(rows=name, debug=debug)


def triton_kernels(enabled: bool = True):
    """`implementation(moments="triton")`, or "plain", under its older name."""
    return implementation(moments="triton" if enabled else "plain")
