"""Types, errors and files that every other room uses; no framework."""
