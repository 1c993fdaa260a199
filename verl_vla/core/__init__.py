"""Types, errors and file primitives that every other package uses; imports no framework."""
