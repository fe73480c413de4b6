"""Whether a checkpoint fits a network, and checkpoints of the original code."""
