"""Stateless propagators, under the name by which examples reach them from here; see
`sigprop.functional.propagators`."""

from ..functional.propagators import fixed, forward, identity

__all__ = ["fixed", "forward", "identity"]
