"""Policies: what one must look like, and OpenVLA-OFT."""
