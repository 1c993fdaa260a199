"""Policies: their interface, and the architectures OpenVLA-OFT and scratch VLA."""
