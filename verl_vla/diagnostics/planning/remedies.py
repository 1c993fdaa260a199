"""Changes with which a recipe fits into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from verl_vla.config.grpo import Recipe
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.planning.plan import Plan, make_plan
from verl_vla.policies.base import ModelConfig

MOST_NODES = 8
"""Largest number of nodes that is suggested; beyond it, adapters are the better remedy."""
ADAPTER_RANK = 16
"""Rank of suggested adapters: siglip-grpo, configs/train_rl.yaml."""

Changes = Mapping[str, Any]
"""Values by the names of options."""


def find_remedy(plan: Plan, config: ModelConfig) -> tuple[Changes, Plan] | None:
    """Return the first known change with which ``plan`` fits, or None.

    The order is: gather weights for every policy step, fewer simulator processes, recompute
    activations, smaller micro-batches, more nodes, adapters, 4 bits.
    """
    for changes in _candidates(plan):
        try:
            changed = make_plan(_apply(plan.recipe, changes), config, plan.gpu)
        except ConfigError:
            continue  # the options exclude each other; try the next candidate
        if changed.fits:
            return changes, changed
    return None


def _candidates(plan: Plan) -> Iterator[Changes]:
    recipe = plan.recipe
    if recipe.cluster.gather_once and recipe.cluster.num_ranks > 1:
        yield {"cluster.gather_once": False}
    for num_workers in _enough_simulators(plan):
        yield {"environment.num_workers": num_workers}
    # from here on every change comes on top of those before
    changes: dict[str, Any] = {}
    if not recipe.policy.gradient_checkpointing:
        changes["policy.gradient_checkpointing"] = True
        yield dict(changes)
    size = recipe.optimizer.micro_batch_size
    while size > 1:
        size //= 2
        yield changes | {"optimizer.micro_batch_size": size}
    if recipe.policy.lora_rank is None:
        nodes = recipe.cluster.num_nodes
        while (nodes := 2 * nodes) <= MOST_NODES:
            yield changes | {"cluster.num_nodes": nodes}
        changes["policy.lora_rank"] = ADAPTER_RANK
        yield dict(changes)
    # 4 bits are not sharded, so one rank holds them (ADR-0008)
    one_rank = {"cluster.num_nodes": 1, "cluster.ranks_per_node": 1}
    changes |= {"policy.quantization": "nf4", "optimizer.micro_batch_size": 1} | one_rank
    yield dict(changes)


def _enough_simulators(plan: Plan) -> Iterator[int]:
    """Yield fewer simulator processes, half as many each time, that the policy still waits for."""
    num_workers, least = plan.recipe.environment.num_workers, plan.recipe.cluster.ranks_per_node
    # the work of all processes, as one would take it
    seconds = plan.seconds["rollout: simulators"] * num_workers
    # fewer than one for each GPU spare nothing
    while (num_workers := num_workers // 2) >= least:
        if seconds / num_workers <= plan.seconds["rollout: policy"]:
            yield num_workers


def _apply(recipe: Recipe, changes: Changes) -> Recipe:
    for name, value in changes.items():
        section, option = name.split(".")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{option: value})})
    return recipe
