"""Plan of one recipe on one kind of GPU: memory, cores, time, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from verl_vla.config.choices import Gpu
from verl_vla.config.grpo import GRPOPolicyConfig, Recipe
from verl_vla.diagnostics.planning.duration import num_policy_steps, step_seconds, total_seconds
from verl_vla.diagnostics.planning.encoding import encoder_load
from verl_vla.diagnostics.planning.memory import DeviceMemory, device_memory, host_memory
from verl_vla.diagnostics.planning.trace import Adapters, ModelConfig, Trace, trace_model
from verl_vla.envs.registry import suite
from verl_vla.policies.base import DTYPES
from verl_vla.runs.disk_space import WeightCount, disk_bytes

CORES_BESIDE = 2
"""Cores of the trainer, which scores and fills the rollout buffer, and of TransferQueue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Requirements of a recipe."""

    recipe: Recipe
    gpu: Gpu | None
    """Kind of GPU; None if the ranks run on CPU cores."""
    trace: Trace
    policy_steps: int
    """Policy steps of one round, at most."""
    device: DeviceMemory
    host: Mapping[str, int]
    """Bytes of a node, part by part."""
    disk: Mapping[str, int]
    """Bytes of the run's folder, part by part."""
    seconds: Mapping[str, float]
    """Seconds of a training step, part by part; empty if the ranks run on CPU cores."""

    @property
    def fits(self) -> bool:
        """True if the device memory suffices; the host's memory is unknown and not checked."""
        return self.gpu is None or self.device.peak <= self.gpu.memory_bytes

    @property
    def total_seconds(self) -> float:
        """Seconds of a training step."""
        return total_seconds(dict(self.seconds))

    def as_json(self) -> dict[str, Any]:
        """Return the sums, for programs: bytes, cores and seconds."""
        return {
            "fits": self.fits,
            "device_bytes": self.device.peak,
            "host_bytes": sum(self.host.values()),
            "host_cores": host_cores(self.recipe),
            "disk_bytes": sum(self.disk.values()),
            "step_seconds": self.total_seconds if self.seconds else None,
        }


def make_plan(recipe: Recipe, config: ModelConfig, gpu: Gpu | None) -> Plan:
    """Plan ``recipe`` for a policy of ``config``; ``gpu`` is None if it runs on CPU cores.

    Raises:
        ConfigError: the recipe's suite is unknown, or one of its numbers is invalid there.
    """
    if gpu is None:
        # the parts of memory depend on it
        recipe = replace(recipe, cluster=replace(recipe.cluster, device="cpu"))
    chosen, shape = suite(recipe.environment.suite), config.shape
    trace = trace_policy(recipe.policy, config)
    policy_steps = num_policy_steps(recipe, shape, chosen)
    encoder = encoder_load(recipe, config, policy_steps)
    return Plan(
        recipe=recipe,
        gpu=gpu,
        trace=trace,
        policy_steps=policy_steps,
        device=device_memory(recipe, trace, chosen, encoder),
        host=host_memory(recipe, trace, shape, chosen, policy_steps, encoder),
        disk=disk_bytes(recipe, WeightCount(trace.weights, trace.trained), shape, chosen),
        seconds={} if gpu is None else step_seconds(recipe, trace, shape, chosen, gpu, encoder),
    )


def trace_policy(policy: GRPOPolicyConfig, config: ModelConfig) -> Trace:
    """Trace the model of ``config`` with the settings of ``policy``."""
    return trace_model(
        config,
        dtype=DTYPES[policy.dtype],
        adapters=adapters_of(policy),
        checkpointing=policy.gradient_checkpointing,
        # 4-bit weights are not sharded
        autocast=policy.quantization == "nf4",
    )


def host_cores(recipe: Recipe) -> int:
    """Return the cores that a node keeps busy: one for each simulator process and each rank."""
    simulators = 0 if recipe.cluster.env_nodes else recipe.environment.num_workers
    return simulators + recipe.cluster.ranks_per_node + CORES_BESIDE


def adapters_of(policy: GRPOPolicyConfig) -> Adapters | None:
    """Return the settings of the adapters of ``policy``, or None where all weights are trained."""
    if policy.lora_rank is None:
        return None
    return Adapters(rank=policy.lora_rank, alpha=policy.lora_alpha, targets=policy.lora_targets)
