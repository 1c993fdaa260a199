"""Reward plug-ins; each file is self-contained and imports only the interface."""
