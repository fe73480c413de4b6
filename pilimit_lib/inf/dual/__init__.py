"""Dual activations: Gaussian pair expectations, their series, and the feature map of a series."""
