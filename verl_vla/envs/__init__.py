"""Simulators: the interface of an environment, the suites, and the pool that runs many."""
