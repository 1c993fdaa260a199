"""A profile at its published size: the plan, and the replay of it."""

from __future__ import annotations

from verl_vla.cli.plan import policy_config, replay_plan
from verl_vla.config.choices import GPUS
from verl_vla.config.compose import load_recipe
from verl_vla.core.allocator import VARIABLES
from verl_vla.diagnostics.planning.plan import Plan, make_plan
from verl_vla.trainer.dry_run.phases import Replay

GB = 10**9
AGREEMENT = 0.05
"""Largest difference between plan and replay, and smallest share of the GPU that stays free."""


def replayed(profile: str, gpu: str, monkeypatch) -> tuple[Plan, Replay]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    recipe = load_recipe(["recipe=libero", f"profile={profile}"])
    config, source = policy_config(recipe)
    assert "OpenVLA-OFT as published" in source
    plan = make_plan(recipe, config, GPUS[gpu])
    return plan, replay_plan(plan, config)


def disagreements(plan: Plan, result: Replay) -> list[str]:
    """Phases in which the plan is not what was replayed, with both numbers."""
    pairs = {
        phase: (plan.device.allocated(phase), result.worst(phase).allocated)
        for phase in plan.device.phases
    }
    largest = result.worst(plan.device.largest)
    held = plan.device.allocated(plan.device.largest) + plan.device.fragmented
    pairs["reserved"] = (held, largest.reserved)
    return [
        f"{name}: planned {planned / GB:.2f} GB, replayed {found / GB:.2f} GB"
        for name, (planned, found) in pairs.items()
        if abs(planned - found) > AGREEMENT * found
    ]


def least_free(plan: Plan, result: Replay) -> float:
    """Smallest share of the GPU's memory that nobody held."""
    assert plan.gpu is not None
    return min(phase.free for phase in result.phases) / plan.gpu.memory_bytes


def beyond_training(result: Replay, kind: str) -> int:
    """Bytes on the device that a phase takes on top of what training takes at its peak."""
    training = max(result.worst("update").allocated, result.worst("rollout").allocated)
    return result.worst(kind).allocated - training
