"""One training run: its state, its structure over time, its checkpoints and journal."""
