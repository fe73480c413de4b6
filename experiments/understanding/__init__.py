"""What infinite networks let one see: lazy or rich, scaling with width, samples behind a model."""
