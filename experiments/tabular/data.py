"""Tabular data that packages ship: nothing is downloaded, and a set whose package is not installed
is left out by name.

scikit-learn's own are always there. `pip install ISLP statsmodels` brings the others, whose CSV
files are read without importing the packages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn import datasets

LARGEST = 1000  # samples that are drawn, once, from larger sets


@dataclass(frozen=True)
class Table:
    """Samples X [n d] and targets y [n]; `source`: the package, or "synthetic"."""

    name: str
    X: np.ndarray
    y: np.ndarray
    classes: bool
    source: str


def names() -> list[str]:
    """Of all sets, installed or not."""
    return [*_SHIPPED, *_SYNTHETIC, *_FILES]


def load(name: str) -> Table:
    """Raises ModuleNotFoundError where the package that ships it is not installed."""
    if name in _SHIPPED:
        X, y = _SHIPPED[name](return_X_y=True)
        return _drawn(Table(name, X, y, name != "diabetes", "scikit-learn"))
    if name in _SYNTHETIC:
        X, y = _SYNTHETIC[name](600, noise=1.0, random_state=0)
        return Table(name, X, y, False, "synthetic")
    package, file, target, without = _FILES[name]
    frame = pd.read_csv(_folder(package) / file).dropna().drop(columns=without)
    y = frame.pop(target)
    X = pd.get_dummies(frame, drop_first=True).to_numpy(float)
    classes = not pd.api.types.is_numeric_dtype(y)
    return _drawn(Table(name, X, y.to_numpy(), classes, package))


def _drawn(table: Table) -> Table:
    if len(table.y) <= LARGEST:
        return table
    rows = np.sort(np.random.RandomState(0).permutation(len(table.y))[:LARGEST])
    return Table(table.name, table.X[rows], table.y[rows], table.classes, table.source)


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package}")
    return Path(found.origin).parent


_SHIPPED: dict[str, Callable] = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "diabetes": datasets.load_diabetes,
    "breast_cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
}
_SYNTHETIC: dict[str, Callable] = {
    "friedman1": datasets.make_friedman1,
    "friedman2": datasets.make_friedman2,
}
# package, file in it, target, columns that give it away or name the sample
_FILES = {
    "Hitters": ("ISLP", "data/Hitters.csv", "Salary", []),
    "Carseats": ("ISLP", "data/Carseats.csv", "Sales", []),
    "College": ("ISLP", "data/College.csv", "Private", []),
    "OJ": ("ISLP", "data/OJ.csv", "Purchase", []),
    "Wage": ("ISLP", "data/Wage.csv", "wage", ["logwage"]),
    "Bikeshare": ("ISLP", "data/Bikeshare.csv", "bikers", ["casual", "registered"]),
    "fair": ("statsmodels", "datasets/fair/fair.csv", "affairs", []),
    "randhie": ("statsmodels", "datasets/randhie/randhie.csv", "mdvis", []),
}
