"""Measure, compare and check policies."""
