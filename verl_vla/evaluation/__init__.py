"""Evaluation, comparison and checks of policies."""
