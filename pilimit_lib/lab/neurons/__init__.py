"""Neurons under observation: what they are, how often they fire, how fast they learn."""
