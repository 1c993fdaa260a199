"""The training engine: FSDP, optimizers, weights, and what happens when a loss is not finite."""
