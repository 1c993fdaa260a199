"""LIBERO's suites, perturbed or not, and their simulator."""
