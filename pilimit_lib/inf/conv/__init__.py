"""Convolutional layers as moments, and their finite twins."""
