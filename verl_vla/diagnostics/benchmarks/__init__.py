"""How fast the parts are, each beside the way its peers do it; see `verl_vla.cli.bench`.

A benchmark is a module with ``add_options(parser)`` and ``measure(options)``, which returns one
flat record. Two ways of doing the same are measured in one run and take turns, so that whatever
else the machine does meets both.
"""
