"""Supervised fine-tuning on LIBERO's demonstrations, up to the border to veRL."""
