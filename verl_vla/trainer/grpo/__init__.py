"""GRPO under veRL's trainer."""
