"""Demonstrations: recording, reading, augmentation, batches."""
