"""Memory of a device and of a node, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from verl_vla.config.grpo import Recipe
from verl_vla.core.allocator import EXPANDABLE, allocator_variables
from verl_vla.diagnostics.planning.encoding import EncoderLoad
from verl_vla.diagnostics.planning.trace import PROMPT_TOKENS, RGB, Trace
from verl_vla.envs.base import Suite, simulators_per_process
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.checkpoint import WEIGHTS_FILE_BYTES
from verl_vla.rewards.encoders.base import BATCHES_A_RANK

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
"""Bytes of CUDA's context, of libraries and of NCCL's buffers: assumed, not measured."""
FRAGMENTED_SHARE = {True: 0.025, False: 0.17}
"""Bytes that the allocator holds and cannot use, as a share of those in tensors at the peak, with
and without expandable segments: as replayed, docs/dry-run.md."""
RENDERER_BYTES, LIBERO_RENDERER_BYTES = 100_000_000, 440_000_000
"""GPU memory of a simulator process, which keeps the renderer of one task there
(`verl_vla.envs.libero.egl_devices.RENDERERS_ON_GPU`). LIBERO's: as measured in software, nearly all
textures (docs/benchmarks.md, Simulator memory); not measured on a GPU. Mini's: at most its whole
simulator. User-defined suites are assumed to be like LIBERO's."""
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

    phases: Mapping[str, Mapping[str, int]]
    """Bytes of tensors by phase of a run and by part; one phase is active at a time."""
    outside: Mapping[str, int]
    """Bytes that are taken all the time, outside of the rank's tensors."""
    allocator: str
    """Settings of PyTorch's allocator that are assumed."""
    fragmented_share: float
    """Bytes that the allocator holds and cannot use, as a share of those in tensors."""

    def allocated(self, phase: str) -> int:
        """Return the bytes of tensors in a phase."""
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> str:
        """Name of the phase that needs the most."""
        return max(self.phases, key=self.allocated)

    @property
    def fragmented(self) -> int:
        """Bytes that the allocator holds and cannot use in that phase."""
        return round(self.fragmented_share * self.allocated(self.largest))

    @property
    def peak(self) -> int:
        """Largest number of bytes in use."""
        return self.allocated(self.largest) + self.fragmented + sum(self.outside.values())


def micro_batch_rows(recipe: Recipe) -> tuple[int, ...]:
    """Return the rows of three micro-batches as veRL cuts them: unequal, up to the limit."""
    rows = recipe.optimizer.micro_batch_size
    return (max(1, rows - 1), rows, max(1, rows - 2))


def rollout_batch(recipe: Recipe) -> int:
    """Return the policy steps in one batch of a rank: one slot group, divided by the ranks."""
    # the larger of the two slot groups
    half = (recipe.environment.num_slots + 1) // 2
    return -(-half // recipe.cluster.num_ranks)


def device_memory(
    recipe: Recipe, trace: Trace, chosen: Suite, encoder: EncoderLoad | None
) -> DeviceMemory:
    """Estimate the memory on the device of a rank."""
    is_on_gpu = recipe.cluster.device != "cpu"
    outside: dict[str, int] = {}
    settings = ""
    if is_on_gpu:
        outside = {
            "CUDA": CUDA_BYTES,
            "renderers of simulators": _renderer_bytes(recipe, chosen),
        }
        if encoder is not None and encoder.on_device and not encoder.on_ranks:
            outside["reward's encoder"] = CUDA_BYTES + encoder.weight_bytes + encoder.batch_bytes
        settings = " ".join(allocator_variables().values())
    phases = _phases(recipe, trace)
    if encoder is not None and encoder.on_device and encoder.on_ranks:
        # after a rollout: what it gathered is held, and its activations are gone
        phases["encoding"] = phases["save"] | {
            "encoder": encoder.weight_bytes,
            "encoder's batch": encoder.batch_bytes,
        }
    return DeviceMemory(
        phases={
            phase: {name: round(size) for name, size in parts.items() if size}
            for phase, parts in phases.items()
        },
        outside=outside,
        allocator=settings,
        fragmented_share=FRAGMENTED_SHARE[EXPANDABLE in settings] if is_on_gpu else 0.0,
    )


def _phases(recipe: Recipe, trace: Trace) -> dict[str, dict[str, float]]:
    """Return the bytes of every phase, part by part."""
    ranks, is_offloaded = recipe.cluster.num_ranks, recipe.optimizer.name == "deepspeed_cpu_adam"
    trained, per_weight = trace.trained / ranks, BYTES[recipe.policy.dtype]
    is_full, is_sharded = recipe.policy.lora_rank is None, recipe.policy.quantization == "none"
    # offloaded parts lie in the memory of the host, see `host_memory`
    on_device = 0 if is_offloaded else 1
    weights = {"weights": on_device * _weight_bytes(recipe, trace) / ranks}
    state = {"optimizer state": on_device * ADAM_BYTES[recipe.optimizer.name] * trained}
    gradients = {"gradients": on_device * FLOAT32 * trained}
    stored = FLOAT32 if is_full else per_weight
    gathered = _gathered(recipe, trace, per_weight)
    is_gathered_once = recipe.cluster.gather_once and ranks > 1 and not is_offloaded
    # gathered layers, and the one that is being received
    whole = per_weight * (trace.weights + trace.layer)
    in_rollout = {"gathered weights": whole if is_gathered_once else gathered}
    # a layer's gradient is whole until it is reduced, in the pass's dtype and in float32
    in_backward = (per_weight + FLOAT32) * trace.layer if is_full else 0
    # Adam's square roots of second moments: of all weights at once on a GPU, one by one on a CPU
    is_on_cpu = is_offloaded or recipe.cluster.device == "cpu"
    roots = 0 if is_on_cpu or "8bit" in recipe.optimizer.name else FLOAT32 * trained
    # traced for a few policy steps, and proportional to them
    forward, training = trace.forward_bytes / trace.batch, trace.training_bytes / trace.batch
    # a separate reference policy is built first, and stays; adapters are switched off instead
    has_reference = recipe.loss.kl.is_on and is_full
    reference = {"reference weights": weights["weights"] if has_reference else 0}
    # FSDP2 moves the weights outside of layers last, and keeps its share of them beside
    moved = {"moved weights": on_device * stored * trace.root if is_sharded else 0}
    # a checkpoint of all weights is read to where it was written
    read = {"read weights": weights["weights"] if is_full else 0}
    resident = weights | reference
    phases = {
        "build": resident | moved,
        "rollout": resident | state | in_rollout | {"activations": forward * rollout_batch(recipe)},
        "log-probs": resident
        | state
        # before the update, so the weights of the rollout are still gathered
        | in_rollout
        | {
            "gathered reference": gathered if has_reference else 0,
            "activations": forward * recipe.optimizer.micro_batch_size,
        },
        "update": resident
        | state
        | gradients
        | {
            "gathered weights": gathered,
            "gradients of a layer": in_backward,
            "activations": training * recipe.optimizer.micro_batch_size,
        },
        "optimizer step": resident | state | gradients | {"square roots": roots},
        # after an evaluation, which leaves weights gathered
        "save": resident | state | (in_rollout if is_gathered_once else {}),
        # a gathered tensor, and the parts that it is made from
        "export": resident | state | {"one tensor": 2 * stored * trace.tensor if ranks > 1 else 0},
        "resume": resident | max((moved, state | read), key=lambda parts: sum(parts.values())),
    }
    if not (recipe.loss.kl.is_on or recipe.loss.recompute_log_probs):
        del phases["log-probs"]
    return phases


def host_memory(
    recipe: Recipe,
    trace: Trace,
    shape: PolicyShape,
    chosen: Suite,
    num_policy_steps: int,
    encoder: EncoderLoad | None,
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
        # the ranks, and the trainer
        "processes": (per_node + 1) * PROCESS_BYTES,
        "export": _export_bytes(recipe, trace),
    }
    if recipe.optimizer.name == "deepspeed_cpu_adam":
        # the node's part of what is sharded over all ranks
        share = per_node / recipe.cluster.num_ranks
        reference = recipe.loss.kl.is_on and recipe.policy.lora_rank is None
        parts["weights, gradients, state"] = round(
            # of a trained weight, the gradient and both moments
            share * ((1 + reference) * _weight_bytes(recipe, trace) + 3 * FLOAT32 * trace.trained)
        )
    if recipe.cluster.device == "cpu":
        # without GPUs the host is the device of its ranks
        parts["learning"] = per_node * device_memory(recipe, trace, chosen, encoder).peak
    if encoder is not None:
        parts["reward's encoder"] = _encoder_bytes(encoder, per_node)
    return parts


def _encoder_bytes(encoder: EncoderLoad, num_ranks: int) -> int:
    """Return what the encoder of a reward takes of a node's host."""
    here = 0 if encoder.on_device else encoder.batch_bytes
    if not encoder.on_ranks:
        return PROCESS_BYTES + here + (0 if encoder.on_device else encoder.weight_bytes)
    # images of the batches that wait for a rank, or that it computes
    waiting = BATCHES_A_RANK * encoder.image_bytes
    return num_ranks * (encoder.weight_bytes + here + waiting)


def _export_bytes(recipe: Recipe, trace: Trace) -> int:
    """Return what one file of weights takes, and a tensor that adapters are merged into."""
    written = min(WEIGHTS_FILE_BYTES, _weight_bytes(recipe, trace, loaded=True))
    return round(written + 2 * FLOAT32 * trace.tensor)


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


def _renderer_bytes(recipe: Recipe, chosen: Suite) -> int:
    """Return what the simulator processes hold of one GPU; they take the node's GPUs in turn."""
    # other nodes simulate
    if recipe.cluster.env_nodes:
        return 0
    on_each = -(-recipe.environment.num_workers // recipe.cluster.ranks_per_node)
    return on_each * (RENDERER_BYTES if chosen.name == "mini" else LIBERO_RENDERER_BYTES)
