"""A run on disk: written, read, reported."""
