"""Scripted experts, which read poses and shapes from the simulator that no policy sees."""
