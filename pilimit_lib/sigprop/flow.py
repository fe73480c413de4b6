"""What travels from layer to layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Flow(NamedTuple):
    """Input stream, target stream and the caller's context: a plain triple with names.

    `h` [b ...] input rows; `t` [b ...] or [classes ...] target rows, None at inference; `context`
    is the second argument of the model as it was given (labels), None at inference.
    """

    h: Tensor
    t: Tensor | None
    context: Tensor | None
