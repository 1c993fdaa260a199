"""The border: the only code that imports veRL, Ray and TransferQueue.

Names change once, here: a group is veRL's ``uid``, bins are ``responses``, a policy step is one
row. This file imports nothing, because veRL imports `platform` in the middle of its own import.
"""
