"""The training step of a recipe at its full size, run without a GPU."""
