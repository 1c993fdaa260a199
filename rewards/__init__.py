"""Reward plug-ins; each file stands alone and imports only the interface."""
