"""Faults that are injected into real trainings, and what becomes of each run."""
