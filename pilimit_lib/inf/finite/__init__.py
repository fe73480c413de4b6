"""Finite layers sampled from infinite ones, and layers of that form trained on their own."""
