"""The sums over rows: the formulas, and faster implementations that may refuse."""
