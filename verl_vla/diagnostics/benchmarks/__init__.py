"""Speed benchmarks of the parts, with the method of other projects; see `verl_vla.cli.bench`.

A benchmark is a module with ``add_options(parser)`` and ``measure(options)``, which returns one
flat record. Two methods for the same work are measured in one run and alternate, so that other load
on the machine affects both.
"""
