"""Demonstrations: recorded, read, augmented, batched."""
