"""A layer whose neurons carry dendrites, and what it needs."""
