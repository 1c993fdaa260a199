"""Changes with which a recipe fits into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from verl_vla.config.grpo import Recipe
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.planning.encoding import encoder_arguments
from verl_vla.diagnostics.planning.plan import Plan, make_plan
from verl_vla.policies.base import ModelConfig
from verl_vla.rewards.encoders import DEVICE

MOST_NODES = 8
"""Largest number of nodes that is suggested; beyond it, adapters are the better remedy."""
ADAPTER_RANK = 16
"""Rank of suggested adapters: siglip-grpo, configs/train_rl.yaml."""

ENCODER_ARGS = "reward_args.encoder_args"

Changes = Mapping[str, Any]
"""Values by the names of options."""


def find_remedy(plan: Plan, config: ModelConfig) -> tuple[Changes, Plan] | None:
    """Return the first known change with which ``plan`` fits, or None.

    The order is: gather weights for every policy step, fewer simulator processes, smaller batches
    of the reward's encoder or the encoder on cores, recompute activations, smaller micro-batches,
    more nodes, adapters, 4 bits.
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
    yield from _smaller_encoder(plan)
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


def _smaller_encoder(plan: Plan) -> Iterator[Changes]:
    """Yield smaller batches of an encoder that decides the peak, and at last the encoder on cores.

    No other change helps there: the encoder computes while the policy's activations are gone.
    """
    arguments = encoder_arguments(plan.recipe)
    is_beside = "reward's encoder" in plan.device.outside
    if arguments is None or not (plan.device.largest == "encoding" or is_beside):
        return
    size = int(arguments["batch_size"])
    while size > 1:
        size //= 2
        yield {f"{ENCODER_ARGS}.batch_size": size}
    yield {f"{ENCODER_ARGS}.{DEVICE}": "cpu"}


def _apply(recipe: Recipe, changes: Changes) -> Recipe:
    for name, value in changes.items():
        section, option = name.rsplit(".", 1)
        if section == ENCODER_ARGS:
            given = recipe.reward_args
            own = given["encoder_args"] if "encoder_args" in given else {}
            changed = {**given, "encoder_args": {**own, option: value}}
            recipe = replace(recipe, reward_args=changed)
        else:
            changed = replace(getattr(recipe, section), **{option: value})
            recipe = replace(recipe, **{section: changed})
    return recipe
