"""Layers as moments: all rows ever appended, as one matrix of fixed size."""
