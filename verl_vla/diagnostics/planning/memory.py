"""Memory of a device and of a node, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl_vla.config.grpo import Recipe
from verl_vla.diagnostics.planning.trace import PROMPT_TOKENS, RGB, Trace
from verl_vla.envs.base import Suite, simulators_per_process
from verl_vla.policies.base import PolicyShape
from verl_vla.rl.setup import micro_batch_tokens

FLOAT32 = 4
BYTES = {"float32": FLOAT32, "bfloat16": 2}
ADAM_BYTES = {
    "adamw": 2 * FLOAT32,
    # two bytes, and a float32 scale for every 256 of each: bitsandbytes, blockwise quantization
    "adamw_8bit": 2 * (1 + FLOAT32 / 256),
    "paged_adamw_8bit": 2 * (1 + FLOAT32 / 256),
    "deepspeed_cpu_adam": 2 * FLOAT32,
}
"""Bytes of the two moments of one weight. Paged ones may move to the host; the plan assumes that
they stay on the device."""
NF4_BYTES = 0.5 + 1 / 64 + FLOAT32 / (64 * 256)
"""Bytes of one weight: 4 bits, a scale of 8 bits per 64 weights, one of 32 bits per 256 of these
(QLoRA, arXiv:2305.14314, section 3)."""
GATHERED_LAYERS = 2
"""Layers gathered at the same time: FSDP2 fetches the next one while one computes."""
CUDA_BYTES = 1_000_000_000
"""Bytes of context, libraries and allocator fragmentation: assumed, not measured."""
ENCODER_BYTES = {
    "pixels": 0,
    "dinov2": 1_000_000_000,
    "siglip": 1_500_000_000,
    "policy_towers": 2_000_000_000,
    "vjepa2": 5_000_000_000,
}
"""Bytes of a reward's encoder with its activations. V-JEPA 2 ViT-g: siglip-grpo's blog, "~5 GB".
The others: ViT-L, so400m and both, at 2 bytes per weight, with the same amount for 32 images:
assumed."""
WORKER_BYTES = 500_000_000
"""Private memory of a simulator process before its first simulator: docs/benchmarks.md, Simulator
memory."""
SIMULATOR_BYTES, LIBERO_SIMULATOR_BYTES = 100_000_000, 900_000_000
"""Mean memory of one task's simulator with its renderer, for mini and for LIBERO's suites: the same
table. User-defined suites are assumed to be like LIBERO's."""
PROCESS_BYTES = 1_200_000_000
"""Memory of Python, torch and veRL in a rank or in the trainer: docs/running.md, The plan and the
truth."""
BUFFER_COPIES = 2
"""Copies of a round's data: the trainer's trajectories, and their rows in TransferQueue."""
TOKEN_BYTES = 8 + 4 + 4 + 8
"""Bytes of an action token, its log-probability, a mask and an id in the LM layout:
`verl_vla.trainer.grpo.rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Device memory of the first rank, which needs the most."""

    lasting: Mapping[str, int]
    """Bytes that are allocated all the time."""
    passing: Mapping[str, int]
    """Bytes of each phase of a training step; only one phase is active at a time."""

    @property
    def peak(self) -> int:
        """Largest number of bytes in use."""
        return sum(self.lasting.values()) + max(self.passing.values())


def rows_per_pass(micro_batch_size: int, shape: PolicyShape) -> int:
    """Return the policy steps in one pass of veRL, whose budget counts tokens, not rows."""
    budget = micro_batch_tokens(micro_batch_size, shape)
    return max(1, budget // (PROMPT_TOKENS + shape.num_tokens))


def micro_batch_rows(recipe: Recipe, shape: PolicyShape) -> tuple[int, ...]:
    """Return the rows of three micro-batches in a row: veRL evens out workloads, not rows."""
    rows = rows_per_pass(recipe.optimizer.micro_batch_size, shape)
    return (rows, rows + 1, max(1, rows - 1))


def rollout_batch(recipe: Recipe) -> int:
    """Return the policy steps in one batch of a rank: one slot group, divided by the ranks."""
    # the larger of the two slot groups
    half = (recipe.environment.num_slots + 1) // 2
    return -(-half // recipe.cluster.num_ranks)


def device_memory(recipe: Recipe, trace: Trace, shape: PolicyShape) -> DeviceMemory:
    """Estimate the memory on the device of a rank."""
    ranks, is_offloaded = recipe.cluster.num_ranks, recipe.optimizer.name == "deepspeed_cpu_adam"
    trained, per_weight = trace.trained / ranks, BYTES[recipe.policy.dtype]
    held = {
        "weights": _weight_bytes(recipe, trace) / ranks,
        "gradients": FLOAT32 * trained,
        "optimizer state": ADAM_BYTES[recipe.optimizer.name] * trained,
    }
    # offloaded parts lie in the memory of the host, see `host_memory`
    lasting = {name: 0.0 if is_offloaded else size for name, size in held.items()}
    if recipe.cluster.device != "cpu":
        lasting["reward's encoder"] = _encoder_bytes(recipe.reward_args)
        lasting["CUDA"] = CUDA_BYTES
    gathered = _gathered(recipe, trace, per_weight)
    is_gathered_once = recipe.cluster.gather_once and ranks > 1 and not is_offloaded
    in_rollout = per_weight * trace.weights if is_gathered_once else gathered
    # a layer's gradient is whole until it is reduced, in the pass's dtype and in float32
    in_backward = (per_weight + FLOAT32) * trace.layer if recipe.policy.lora_rank is None else 0
    # Adam's square roots of second moments: of all weights at once on a GPU, one by one on a CPU
    roots = 0 if is_offloaded or recipe.cluster.device == "cpu" else FLOAT32 * trained
    rows = rows_per_pass(recipe.optimizer.micro_batch_size, shape)
    passing = {
        # traced for a few policy steps, and proportional to them
        "update": gathered + in_backward + trace.training_bytes / trace.batch * rows,
        "rollout": in_rollout + trace.forward_bytes / trace.batch * rollout_batch(recipe),
        "optimizer step": roots,
    }
    return DeviceMemory(
        lasting={name: round(size) for name, size in lasting.items()},
        passing={name: round(size) for name, size in passing.items()},
    )


def host_memory(
    recipe: Recipe, trace: Trace, shape: PolicyShape, chosen: Suite, num_policy_steps: int
) -> dict[str, int]:
    """Estimate the memory of the node that simulates and holds ranks.

    Every rank reads the complete policy into host memory before the first rollout fills the buffer;
    the larger of the two counts.
    """
    per_node = recipe.cluster.ranks_per_node
    images = shape.num_views * shape.image_size**2 * RGB
    row = images + (PROMPT_TOKENS + shape.num_tokens) * TOKEN_BYTES
    buffer = BUFFER_COPIES * num_policy_steps * row
    loading = round(per_node * _weight_bytes(recipe, trace, loaded=True))
    parts = {
        "rollout buffer": buffer,
        # loading is over when the buffer fills, so only the difference adds to it
        "loading, above the buffer": max(0, loading - buffer),
        "simulators": recipe.environment.num_workers * _worker_bytes(recipe, chosen),
        "processes": (per_node + 1) * PROCESS_BYTES,
    }
    if recipe.optimizer.name == "deepspeed_cpu_adam":
        share = per_node / recipe.cluster.num_ranks
        parts["weights, gradients, state"] = round(
            # of a trained weight, the gradient and both moments
            share * (_weight_bytes(recipe, trace) + 3 * FLOAT32 * trace.trained)
        )
    if recipe.cluster.device == "cpu":
        parts["learning"] = per_node * device_memory(recipe, trace, shape).peak
    return parts


def _worker_bytes(recipe: Recipe, chosen: Suite) -> int:
    """Return the memory of a simulator process that has built as many tasks as it keeps."""
    tasks = recipe.environment.tasks
    num_tasks = len(chosen.tasks) if tasks is None else len(tasks)
    kept = min(num_tasks, simulators_per_process(num_tasks, recipe.environment.num_workers))
    return WORKER_BYTES + kept * (
        SIMULATOR_BYTES if chosen.name == "mini" else LIBERO_SIMULATOR_BYTES
    )


def _weight_bytes(recipe: Recipe, trace: Trace, *, loaded: bool = False) -> float:
    """Return the bytes of all weights: float32 for trained ones, else the dtype of the policy."""
    policy = recipe.policy
    if policy.lora_rank is None:
        return FLOAT32 * trace.weights
    # loading reads weights in full; they are quantized on the device
    in_4_bits = trace.under_adapters if policy.quantization == "nf4" and not loaded else 0
    plain = BYTES[policy.dtype] * (trace.frozen - in_4_bits)
    return plain + NF4_BYTES * in_4_bits + FLOAT32 * trace.trained


def _gathered(recipe: Recipe, trace: Trace, per_weight: int) -> float:
    """Return the bytes of gathered weights; 4-bit ones are not sharded, and unpacked one by one."""
    if recipe.policy.quantization == "nf4":
        # unpacked for the layer that computes, and dropped after it
        return per_weight * trace.layer
    return per_weight * (trace.root + GATHERED_LAYERS * trace.layer)


def _encoder_bytes(reward_args: Mapping[str, Any]) -> int:
    return ENCODER_BYTES[reward_args["encoder"]] if "encoder" in reward_args else 0
