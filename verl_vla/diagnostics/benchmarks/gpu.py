"""Benchmark of OpenVLA-OFT in its published size on one device, without the hub and Ray.

The weights are random, since the speed does not depend on their values. ``--size tiny`` runs the
same code on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from verl_vla.config.shared import LORA_ALPHA
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.benchmarks.measuring import Record, record, require_positive
from verl_vla.policies.base import ActionSampler
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTModel
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tokenizer, tiny_config

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 32
"""Length of the prompt; LIBERO's have 20 to 38 tokens with the published tokenizer."""
LORA_RANK = 32
"""Rank of the adapters; openvla-oft ``vla-scripts/finetune.py``."""
BYTES_PER_GIB = 1024**3


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--size", choices=("published", "tiny"), default="published")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--batch", type=int, nargs="+", default=[1, 8, 32, 64], help="batch sizes of policy steps")
    add("--update-batch", type=int, default=8, help="rows of one forward and backward pass")
    add("--matmul", type=int, default=8192, help="size of the matrices that measure the peak")
    add("--repeats", type=int, default=5, help="passes that are timed together")


def measure(options: argparse.Namespace) -> Record:
    """Time policy steps, and updates of adapters and of all weights (without the optimizer)."""
    require_positive(options, "batch", "update_batch", "matmul", "repeats")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch finds none; set --device cpu --size tiny")
    clock = _Clock(options.device, options.repeats)
    peak = matmul_peak(clock, options.matmul)
    model = build(options.size, options.device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "matmul_peak_tflops": round(peak / 1e12, 3),
        "tflop_per_policy_step": round(flops(model) / 1e12, 6),
    }
    rows = _Rows(model)
    for batch in options.batch:
        rows.add(
            f"policy_steps_{batch}",
            lambda batch=batch: policy_steps(clock, model, batch, peak),
        )
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # the whole model first: adapters freeze it
    rows.add("full_update", lambda: update(clock, model, options.update_batch, "full_update"))
    model.add_adapters(rank=LORA_RANK, alpha=LORA_ALPHA, targets="all-linear")
    rows.add("lora_update", lambda: update(clock, model, options.update_batch, "lora_update"))
    return record("gpu", options, results | rows.measured | {"did_not_fit": rows.did_not_fit})


class _Rows:
    """The rows of the table; what needs more memory than the device has is left out and named."""

    def __init__(self, model: OpenVLAOFTModel) -> None:
        self.measured: dict[str, Any] = {}
        self.did_not_fit: list[str] = []
        self._model = model

    def add(self, name: str, row: Callable[[], dict[str, Any]]) -> None:
        """Measure a row."""
        try:
            self.measured |= row()
        except torch.OutOfMemoryError as error:
            self.did_not_fit.append(name)
            logger.warning("%s does not fit: %s", name, str(error).split(". ")[0])
        # after the error is gone, which holds what the pass had allocated; and the gradients of
        # all weights would count as the adapters' memory
        self._model.zero_grad(set_to_none=True)
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()


def build(size: str, device: str) -> OpenVLAOFTModel:
    """Make the model with random weights in bfloat16."""
    config = OpenVLAOFTConfig() if size == "published" else _tiny()
    before = torch.get_default_dtype()
    # in bfloat16 at once: built in float32, the model would need twice the memory
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return OpenVLAOFTModel(config).eval()
    finally:
        torch.set_default_dtype(before)


def matmul_peak(clock: _Clock, size: int) -> float:
    """Measure the floating-point operations per second of one large bfloat16 product."""
    a = torch.randn(size, size, device=clock.device, dtype=torch.bfloat16)
    # a product of two square matrices: n^3 multiplications and as many additions
    return 2 * size**3 / clock.seconds(lambda: a @ a)


def flops(model: OpenVLAOFTModel) -> int:
    """Count the floating-point operations of one policy step."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _choose(model, 1)
    return counter.get_total_flops()


def policy_steps(clock: _Clock, model: OpenVLAOFTModel, batch: int, peak: float) -> dict[str, Any]:
    """Time policy steps at one batch size."""
    with torch.no_grad():
        seconds = clock.seconds(lambda: _choose(model, batch))
    return {
        f"policy_steps_per_s_{batch}": round(batch / seconds, 2),
        f"share_of_peak_{batch}": round(batch * flops(model) / seconds / peak, 3),
        f"memory_gib_{batch}": clock.peak_gib(),
    }


def update(clock: _Clock, model: OpenVLAOFTModel, rows: int, name: str) -> dict[str, Any]:
    """Time forward and backward passes of a batch of rows."""

    def work() -> None:
        logits = model(*_inputs(model, rows)).logits
        # a number that all logits, and so all weights, have a part in
        logits.log_softmax(-1).mean().backward()

    seconds = clock.seconds(work)
    return {
        f"{name}_rows_per_s": round(rows / seconds, 2),
        f"{name}_memory_gib": clock.peak_gib(),
    }


class _Clock:
    """Timer for work on a device that runs asynchronously."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device = device
        self._repeats = repeats

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the mean of the repeats, after a warm-up call."""
        # the first call also compiles, allocates and fills caches
        work()
        self._wait()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(self._repeats):
            work()
        self._wait()
        return (time.perf_counter() - began) / self._repeats

    def peak_gib(self) -> float | None:
        """Return the peak memory of the device since `seconds` began; None on a CPU."""
        if self.device != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated() / BYTES_PER_GIB, 2)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _tiny() -> OpenVLAOFTConfig:
    sizes = TinySizes(fused=True)
    return tiny_config(build_tokenizer(["lift the cube"]), sizes)


def _inputs(model: OpenVLAOFTModel, batch: int) -> tuple[Tensor, Tensor]:
    config, device = model.config, model.device
    channels = 3 * len(config.towers) * config.num_images_in_input
    size = (batch, channels, config.image_size, config.image_size)
    pixels = torch.rand(size, device=device, dtype=model.dtype)
    return pixels, torch.ones(batch, PROMPT_TOKENS, dtype=torch.int64, device=device)


def _choose(model: OpenVLAOFTModel, batch: int) -> Tensor | None:
    noise = torch.full((batch, model.config.num_action_tokens), 0.5, dtype=torch.float64)
    return model(
        *_inputs(model, batch), sampler=ActionSampler(noise.to(model.device), 1.0)
    ).action_tokens
