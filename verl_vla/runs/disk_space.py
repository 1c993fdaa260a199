"""Disk space that a GRPO run needs, from its recipe, before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from verl_vla.config.grpo import GRPOPolicyConfig, Recipe
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import free_bytes
from verl_vla.envs.base import Suite
from verl_vla.policies.base import DTYPES, PolicyShape
from verl_vla.rl.setup import most_policy_steps

GB = 1e9
FLOAT32 = 4
"""Bytes of a trained weight, and of one of its two moments; 8-bit optimizers keep fewer."""
MOMENTS = 2
LINE_BYTES = 400
"""Bytes of an episode's line in ``episodes.jsonl`` without progress and actions
(`verl_vla.runs.episode_log.episode_lines`)."""
READING_BYTES = 8
"""Bytes of one policy step's progress, and of its number of executed steps, as JSON."""
BASE64 = 4 / 3
"""Characters for each byte of the actions that are kept."""
FRAME_BYTES = 2_000
"""Bytes of a frame of an episode's video (`verl_vla.runs.episode_recorder`)."""


@dataclass(frozen=True, slots=True)
class WeightCount:
    """Number of weights of a policy, adapters included."""

    every: int
    trained: int


def count_stored(
    layout: Mapping[str, tuple[tuple[int, ...], str]], policy: GRPOPolicyConfig
) -> WeightCount:
    """Count the weights of a checkpoint folder and, at most, of the adapters that it will get.

    Args:
        layout: of `verl_vla.policies.weight_files.read_weight_layout`.
        policy: says whether there are adapters, and their rank.
    """
    shapes = [shape for shape, _ in layout.values()]
    every = sum(math.prod(shape) for shape in shapes)
    if policy.lora_rank is None:
        return WeightCount(every, every)
    # a bound: not every matrix has an adapter
    adapters = policy.lora_rank * sum(sum(shape) for shape in shapes if len(shape) == 2)
    return WeightCount(every + adapters, adapters)


def checkpoint_bytes(recipe: Recipe, weights: WeightCount) -> int:
    """Return the most bytes of a checkpoint: trained weights, their moments, exported policy."""
    policy = recipe.policy
    # all weights are trained in float32 and exported so; others have the policy's dtype
    exported = FLOAT32 if policy.lora_rank is None else DTYPES[policy.dtype].itemsize
    return weights.trained * (1 + MOMENTS) * FLOAT32 + weights.every * exported


def most_checkpoints(recipe: Recipe) -> int:
    """Return the number of checkpoints that a run's folder holds at one time.

    The oldest one is removed after the newest is complete, so there is one more than are kept.
    """
    trainer = recipe.trainer
    steps = trainer.total_training_steps
    saved = -(-steps // trainer.save_every) if trainer.save_every else 1
    return min(trainer.keep_checkpoints + 1, saved)


def disk_bytes(
    recipe: Recipe, weights: WeightCount, shape: PolicyShape, chosen: Suite
) -> dict[str, int]:
    """Return the most bytes that a run's folder holds at one time, part by part."""
    steps = recipe.trainer.total_training_steps
    policy_steps = most_policy_steps(recipe.environment, chosen, shape.chunk_length)
    group = recipe.sampling.group_size
    kept = steps * recipe.trainer.keep_groups * group
    groups = recipe.sampling.groups_per_step
    rounds = recipe.sampling.max_rounds if recipe.sampling.dynamic else 1
    # a bound: a refill plays only the groups that are missing
    played = steps * rounds * groups * group
    actions = round(policy_steps * shape.num_tokens * FLOAT32 * BASE64)
    return {
        "checkpoints": most_checkpoints(recipe) * checkpoint_bytes(recipe, weights),
        "episode log": played * (LINE_BYTES + READING_BYTES * policy_steps)
        + kept * (actions + READING_BYTES * policy_steps),
        "videos": kept * policy_steps * FRAME_BYTES,
    }


def require_disk_space(folder: Path, parts: Mapping[str, int]) -> None:
    """Refuse a run whose folder has no room for what it will hold.

    Args:
        folder: of the run; it need not exist. Checkpoints that it holds already count as written.
        parts: of `disk_bytes`.

    Raises:
        ConfigError: less is free; with what is needed and for what.
    """
    needed, free = max(0, sum(parts.values()) - written_bytes(folder)), free_bytes(folder)
    if free < needed:
        listed = ", ".join(f"{name} {size / GB:.1f} GB" for name, size in parts.items())
        raise ConfigError(
            f"out is {folder}, where {free / GB:.1f} GB are free, and the run needs up to "
            f"{needed / GB:.1f} GB more (in all: {listed}); choose out=FOLDER on a larger disk, or "
            "a smaller trainer.keep_checkpoints"
        )


def written_bytes(folder: Path) -> int:
    """Return the bytes of the checkpoints in a run's folder that the run keeps or replaces."""
    checkpoints = folder / "checkpoints"
    # not what was quarantined or renamed: that stays, beside all that the run writes
    ours = [*checkpoints.glob("global_step_*[0-9]"), checkpoints / "unfinished"]
    return sum(map(tree_bytes, ours))


def tree_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
