"""Classes of kernels of an update, with their FLOPs, bytes and shares of its time.

The operators are counted (`verl_vla.diagnostics.planning.update_pass`); what FSDP2 and bitsandbytes
copy follows from the sizes of the weights. Seconds are those of a roofline: a kernel takes as long
as its FLOPs at the GPU's peak or its bytes at the memory's bandwidth, whichever is longer. They are
computed, not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from verl_vla.config.choices import Gpu
from verl_vla.config.grpo import Recipe
from verl_vla.diagnostics.planning.memory import BYTES, FLOAT32, NF4_BYTES
from verl_vla.diagnostics.planning.operators import COPIES, ELEMENTWISE, NORMS
from verl_vla.diagnostics.planning.plan import Plan, adapters_of
from verl_vla.diagnostics.planning.trace import SameConfig
from verl_vla.diagnostics.planning.update_pass import Unit, count_optimizer, count_pass
from verl_vla.policies.base import DTYPES, ModelConfig

UNPACKED, GATHERED, REDUCED = "4-bit weights unpacked", "weights gathered", "gradients reduced"
CLIPPED, STEPPED = "gradients clipped", "optimizer"
FUSIBLE = (NORMS, ELEMENTWISE, COPIES)
"""Classes that a compiler can merge into kernels beside them."""
ADAM_8BIT_BYTES = 3 * FLOAT32 + 4 * (1 + FLOAT32 / 256)
"""Bytes of an 8-bit step for one weight: reads and writes it and both moments with their scales,
and reads its gradient (bitsandbytes, one kernel a tensor)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """Bytes per second that a GPU moves, by its data sheet."""

    memory: float
    """Bytes per second of the device's memory."""
    link: float
    """Bytes per second to other GPUs of the node, in one direction."""


PCIE_4 = 32e9
"""Bytes per second of PCI Express 4.0 with 16 lanes in one direction: 16 GT/s a lane."""
BANDWIDTHS = {
    "A100 80 GB": Bandwidth(memory=2_039e9, link=300e9),
    "A100 40 GB": Bandwidth(memory=1_555e9, link=300e9),
    "A10G 24 GB": Bandwidth(memory=600e9, link=PCIE_4),
    "H100 SXM 80 GB": Bandwidth(memory=3_350e9, link=450e9),
    "H200 141 GB": Bandwidth(memory=4_800e9, link=450e9),
    "RTX 4090 24 GB": Bandwidth(memory=1_008e9, link=PCIE_4),
}
"""Bandwidths by the name of the GPU: NVIDIA's data sheets, SXM boards where there are several. They
give NVLink's 600 and 900 GB/s for both directions together."""

CUDNN_FIRST = ("H100 SXM 80 GB", "H200 141 GB")
"""GPUs of compute capability 9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One class of kernels, in one optimizer step of one rank."""

    name: str
    flops: float
    bytes: float
    """Bytes read from and written to the device's memory."""
    link_bytes: float
    """Bytes received from other ranks."""
    seconds: float
    """Seconds by the roofline, if nothing else runs at the same time."""


def kernels_of(plan: Plan, config: ModelConfig) -> list[Kernels]:
    """Count the kernels of one optimizer step of one rank, the slowest class first.

    Args:
        plan: of a recipe on a GPU.
        config: configuration of the policy.
    """
    recipe, gpu = plan.recipe, plan.gpu
    assert gpu is not None, "without a GPU there are no speeds"
    policy, is_in_4_bits = recipe.policy, recipe.policy.quantization == "nf4"
    counted = count_pass(
        SameConfig(config),
        DTYPES[policy.dtype],
        recipe.optimizer.micro_batch_size,
        adapters_of(policy),
        policy.gradient_checkpointing,
        is_in_4_bits,
    )
    times = micro_batches(plan)
    found = _Sums(gpu)
    for call, number in counted.calls.items():
        found.add(call.kernel, call.flops, call.bytes, times=times * number)
    if is_in_4_bits:
        # forward, once more where activations are computed again, and backward
        passes = 2 + policy.gradient_checkpointing
        unpacked = (NF4_BYTES + BYTES[policy.dtype]) * counted.under_adapters
        found.add(UNPACKED, 0, unpacked, times=times * passes)
    else:
        for unit in counted.units:
            _add_sharding(found, unit, recipe, times)
    _add_optimizer(found, counted.shapes, recipe)
    return sorted(found.kernels(), key=lambda kernels: -kernels.seconds)


def attention_path(plan: Plan) -> str:
    """Return which kernel computes the language model's attention, and when.

    PyTorch's rules (2.11, ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``) for bfloat16
    and heads of at most 128 values: on capability 9 cuDNN's kernel comes first and takes a mask;
    elsewhere the flash kernel comes first and refuses any mask, and the memory-efficient one takes
    it. ``tests/dry_run`` asks the installed PyTorch on capability 8.
    """
    kind = plan.recipe.policy.attention
    assert plan.gpu is not None, "without a GPU there is no kernel"
    if kind == "flash_attention_2":
        return "flash-attn's kernel, which leaves padding out"
    if kind == "eager":
        return "matrix products and a softmax; counted as one fused kernel"
    if plan.gpu.name in CUDNN_FIRST:
        return "cuDNN's fused kernel, with and without padding"
    return (
        "the memory-efficient kernel where prompts are padded, which makes a mask; without padding "
        "there is no mask, and the flash kernel computes it"
    )


def micro_batches(plan: Plan) -> int:
    """Return the micro-batches of an optimizer step of a rank, at most."""
    optimizer, ranks = plan.recipe.optimizer, plan.recipe.cluster.num_ranks
    rows = -(-plan.policy_steps // (optimizer.num_mini_batches * ranks))
    return -(-rows // optimizer.micro_batch_size)


def fusible_share(kernels: Iterable[Kernels]) -> float:
    """Return the share of the time that a compiler could save at most: of all `FUSIBLE` classes."""
    kernels = list(kernels)
    fusible = sum(part.seconds for part in kernels if part.name in FUSIBLE)
    return fusible / sum(part.seconds for part in kernels)


class _Sums:
    """Sums by class of kernels."""

    def __init__(self, gpu: Gpu) -> None:
        self._peak, self._bandwidth = gpu.bf16_flops, BANDWIDTHS[gpu.name]
        self._sums: dict[str, list[float]] = {}

    def add(
        self, kernel: str, flops: float, moved: float, link: float = 0, *, times: float = 1
    ) -> None:
        """Add a kernel that runs some times."""
        seconds = max(
            flops / self._peak, moved / self._bandwidth.memory, link / self._bandwidth.link
        )
        values = (flops, moved, link, seconds)
        before = self._sums.setdefault(kernel, [0.0] * len(values))
        self._sums[kernel] = [old + times * new for old, new in zip(before, values, strict=True)]

    def kernels(self) -> list[Kernels]:
        """Return the sums."""
        return [
            Kernels(name=name, flops=flops, bytes=moved, link_bytes=link, seconds=seconds)
            for name, (flops, moved, link, seconds) in self._sums.items()
        ]


def _add_sharding(found: _Sums, unit: Unit, recipe: Recipe, times: int) -> None:
    """Add FSDP2's kernels for one unit (`torch.distributed.fsdp._fully_shard`, _fsdp_collectives).

    A collective is a kernel of its own, which moves bytes between GPUs.
    """
    ranks, per_weight = recipe.cluster.num_ranks, BYTES[recipe.policy.dtype]
    others = (ranks - 1) / ranks
    stored = FLOAT32 if recipe.policy.lora_rank is None else per_weight
    gathers = times * (1 + unit.backward)
    weights = unit.trained + unit.frozen
    # the shard in the dtype of the pass
    for number, size in ((unit.trained, FLOAT32), (unit.frozen, stored)):
        if size != per_weight:
            found.add(GATHERED, 0, (size + per_weight) * number / ranks, times=gathers)
    if ranks > 1:
        # into the collective's buffer
        found.add(GATHERED, 0, 2 * per_weight * weights / ranks, times=gathers)
        found.add(GATHERED, 0, 0, per_weight * weights * others, times=gathers)
    # out of it, or out of the shard
    found.add(GATHERED, 0, 2 * per_weight * weights, times=gathers)
    # the whole gradient in float32
    found.add(REDUCED, 0, (per_weight + FLOAT32) * unit.trained, times=times)
    if ranks > 1:
        found.add(REDUCED, 0, 0, FLOAT32 * unit.trained * others, times=times)
    else:
        found.add(REDUCED, 0, 2 * FLOAT32 * unit.trained, times=times)
    # added to that of the micro-batches before
    found.add(REDUCED, 0, 3 * FLOAT32 * unit.trained / ranks, times=times - 1)


def _add_optimizer(found: _Sums, shapes: Sequence[torch.Size], recipe: Recipe) -> None:
    """Add clipping and the optimizer's step, over the shards of a rank."""
    share = 1 / recipe.cluster.num_ranks
    clipped, stepped = count_optimizer(tuple(shapes))
    if recipe.optimizer.name == "deepspeed_cpu_adam":
        # on the host, whose speed is not planned
        return
    for call, number in clipped.items():
        found.add(CLIPPED, 0, share * call.bytes, times=number)
    if recipe.optimizer.name == "adamw":
        for call, number in stepped.items():
            found.add(STEPPED, 0, share * call.bytes, times=number)
    else:
        numel = sum(shape.numel() for shape in shapes)
        found.add(STEPPED, 0, share * ADAM_8BIT_BYTES * numel)
