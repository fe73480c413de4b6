"""Steps of networks of any width: SGD that appends rows, rates, gradients of any form."""

from .degrees import DegreeRates
from .parallel import InputFactors, sum_gradients_
from .rates import param_groups
from .sgd import InfSGD, PiSGD

__all__ = ["DegreeRates", "InfSGD", "InputFactors", "PiSGD", "param_groups", "sum_gradients_"]
