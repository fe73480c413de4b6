"""Checks that a user can run, under the paths that the original's README prints."""
