"""Seconds of one training step, part by part, from published speeds."""

from __future__ import annotations

from verl_vla.config.choices import Gpu
from verl_vla.config.grpo import Recipe
from verl_vla.diagnostics.planning.encoding import EncoderLoad
from verl_vla.diagnostics.planning.trace import Trace
from verl_vla.envs.base import Suite
from verl_vla.policies.base import PolicyShape

ROLLOUT_EFFICIENCY = 0.22
"""Share of a GPU's peak that a forward pass reaches: 13.6 policy steps per second of 4.94 TFLOP on
an A100 (openvla-oft, arXiv:2502.19645, table of speeds, parallel decoding of discrete tokens; one
policy step at a time, so a batch reaches more)."""
UPDATE_EFFICIENCY = 0.4
"""Share of a GPU's peak that forward and backward reach. Published extremes: 0.57 for a language
model of this size under FSDP on A100 (PyTorch's blog "Maximizing training throughput using PyTorch
FSDP", 2024), 0.12 for a complete training step of SimpleVLA-RL (its issue 8: 45 minutes on 8 A800).
Assumed, not measured."""
ENCODING_EFFICIENCY = UPDATE_EFFICIENCY
"""Share of a GPU's peak that the encoder of a reward reaches: assumed to be that of the update,
whose batches are as large."""
STEP_S, MINI_STEP_S = 0.0058, 0.0030
VIEW_S, MINI_VIEW_S = 0.098, 0.0074
"""Seconds of a step and of a view, for LIBERO's suites and for mini, on one core with software
rendering on a busy machine: docs/benchmarks.md, Simulator. User-defined suites are assumed to be
like LIBERO's."""


def num_policy_steps(recipe: Recipe, shape: PolicyShape, chosen: Suite) -> int:
    """Return the policy steps of a round in which all episodes reach the step limit: a bound."""
    tasks = (
        range(len(chosen.tasks)) if recipe.environment.tasks is None else recipe.environment.tasks
    )
    # limits differ between tasks, and a round is as long as its longest episodes
    limit = max(chosen.step_limit(recipe.environment.step_limit, task) for task in tasks)
    episodes = recipe.sampling.groups_per_step * recipe.sampling.group_size
    # rounded up: a last chunk that the limit cuts short is asked for too
    return episodes * -(-limit // shape.chunk_length)


def step_seconds(
    recipe: Recipe,
    trace: Trace,
    shape: PolicyShape,
    chosen: Suite,
    gpu: Gpu,
    encoder: EncoderLoad | None,
) -> dict[str, float]:
    """Estimate the seconds of each part of a training step with one rollout round.

    Simulators and policy alternate on two slot groups, so a rollout takes as long as the slower of
    the two.
    """
    policy_steps = num_policy_steps(recipe, shape, chosen)
    is_mini = chosen.name == "mini"
    step_s, view_s = (MINI_STEP_S, MINI_VIEW_S) if is_mini else (STEP_S, VIEW_S)
    # a policy step simulates a chunk and renders each view once
    per_policy_step = shape.chunk_length * step_s + shape.num_views * view_s
    speed = recipe.cluster.num_ranks * gpu.bf16_flops
    forward = policy_steps * trace.forward_flops / (speed * ROLLOUT_EFFICIENCY)
    return {
        "rollout: simulators": policy_steps * per_policy_step / recipe.environment.num_workers,
        "rollout: policy": forward,
        "reward: encoder": 0.0 if encoder is None else _encoding_seconds(recipe, gpu, encoder),
        "log-probs again": forward if recipe.loss.recompute_log_probs else 0.0,
        "log-probs of the reference": forward if recipe.loss.kl.is_on else 0.0,
        "update": policy_steps * trace.training_flops / (speed * UPDATE_EFFICIENCY),
    }


def total_seconds(parts: dict[str, float]) -> float:
    """Return the seconds of a training step."""
    side_by_side = ("rollout: simulators", "rollout: policy")
    one_by_one = sum(seconds for name, seconds in parts.items() if name not in side_by_side)
    return max(parts[name] for name in side_by_side) + one_by_one


def _encoding_seconds(recipe: Recipe, gpu: Gpu, encoder: EncoderLoad) -> float:
    """Return the seconds of a round's features; 0 on cores, whose speed is not planned."""
    num_gpus = recipe.cluster.num_ranks if encoder.on_ranks else 1
    reached = num_gpus * gpu.bf16_flops * ENCODING_EFFICIENCY
    return encoder.flops / reached if encoder.on_device else 0.0
