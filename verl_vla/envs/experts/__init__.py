"""Scripted experts: they read poses and shapes from the simulator, which no policy sees."""
