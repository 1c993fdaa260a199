"""Diagnostics: checks of the machine and of LIBERO, soak test, benchmarks, resource planning."""
