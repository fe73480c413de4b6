"""Scores as users give them."""

import math


def as_score(score) -> float:
    """A score as a Python number; numbers, numpy numbers and tensors of one element will do."""
    if isinstance(score, bool) or isinstance(score, (str, bytes)):
        raise TypeError(
            f"the score is {score!r} ({type(score).__name__}); give one number, such as the "
            "validation accuracy"
        )
    try:
        value = float(score)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {list(score.shape)}" if hasattr(score, "shape") else ""
        raise TypeError(
            f"the score is a {type(score).__name__}{shape}; give one number, such as the "
            "validation accuracy"
        ) from None
    if math.isinf(value):
        raise ValueError(
            f"the score is {value}; give a finite number (nan counts as no improvement)"
        )
    return value
