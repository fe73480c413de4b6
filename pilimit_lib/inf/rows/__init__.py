"""Layers as rows: a direction, a value and a multiplier per sample, appended at every step."""
