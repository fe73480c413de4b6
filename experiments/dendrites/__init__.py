"""Dendrites on real data, beside the controls that make a claim honest."""
