"""Training: the only code that imports veRL, Ray and TransferQueue.

A group is veRL's ``uid``, action tokens are ``responses``, and a policy step is one row. This file
imports nothing, because veRL imports `verl_compat.platform` in the middle of its own import.
"""
