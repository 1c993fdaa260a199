"""What a recipe needs of a machine: memory, duration, and remedies where it does not fit."""
