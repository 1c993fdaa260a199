"""LIBERO's suites and their simulator."""
