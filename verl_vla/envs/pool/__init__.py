"""Simulator processes, and the slots that episodes occupy in them."""
