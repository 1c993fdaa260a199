"""What a recipe needs of a machine, told before one is rented."""

from verl_vla.diagnostics.planning.gpus import GPUS, Gpu
from verl_vla.diagnostics.planning.plan import Plan, make_plan
from verl_vla.diagnostics.planning.remedies import find_remedy

__all__ = ["GPUS", "Gpu", "Plan", "find_remedy", "make_plan"]
