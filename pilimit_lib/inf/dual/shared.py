"""One feature map for each kernel: operators are handed numbers, and find the map that they mean
here."""

from __future__ import annotations

import functools

from .features import PolynomialFeatures


@functools.lru_cache(maxsize=64)
def shared_features(r: int, kappa: tuple[float, ...]) -> PolynomialFeatures:
    """The same object for the same arguments, with the tables that it has made."""
    return PolynomialFeatures(r, kappa)
