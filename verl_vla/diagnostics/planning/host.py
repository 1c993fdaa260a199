"""What a cloud is asked for beside GPUs: processors and memory of one node."""

from __future__ import annotations

from typing import Any

from verl_vla.config.grpo import Recipe
from verl_vla.diagnostics.planning.plan import Plan

CORES_BESIDE = 2
"""Cores of the trainer, which scores and fills the rollout buffer, and of TransferQueue."""


def host_cores(recipe: Recipe) -> int:
    """Return the cores that a node keeps busy: one for each simulator process and each rank."""
    simulators = 0 if recipe.cluster.env_nodes else recipe.environment.num_workers
    return simulators + recipe.cluster.ranks_per_node + CORES_BESIDE


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the sums of a plan, for programs: bytes, cores and seconds."""
    return {
        "fits": plan.fits,
        "device_bytes": plan.device.peak,
        "host_bytes": sum(plan.host.values()),
        "host_cores": host_cores(plan.recipe),
        "disk_bytes": sum(plan.disk.values()),
        "step_seconds": plan.total_seconds if plan.seconds else None,
    }
