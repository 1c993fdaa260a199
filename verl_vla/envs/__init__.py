"""Simulators: what one must look like, the suites, and the pool that runs many."""
