"""Names that the original's users import; they live in `rows`."""

from .rows.parameter import InfPiParameter

__all__ = ["InfPiParameter"]
