"""Benchmark of forward and backward passes over rows of policy steps, and of their memory.

Each variant runs in a separate process, so that peak memory is measured separately.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from verl_vla.config.grpo import ClipRange
from verl_vla.diagnostics.benchmarks.measuring import (
    Record,
    record,
    require_policy,
    require_positive,
    spread,
    timed,
)
from verl_vla.policies.action_distribution import entropy, log_prob
from verl_vla.policies.base import TrainablePolicy
from verl_vla.policies.registry import load_policy
from verl_vla.rl.loss import policy_loss

KIB_PER_GIB = 1024**2
"""KiB per GiB; ``ru_maxrss`` is in KiB on Linux (getrusage(2))."""
INSTRUCTION = "push the red cube onto the green marker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One variant of an update."""

    micro_batch_size: int
    with_checkpointing: bool = False
    with_entropy: bool = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--policy", default="bases/mini", help="folder of the policy")
    add("--rows", type=int, default=256, help="policy steps of one update")
    add("--micro-batch-size", type=int, default=64, help="policy steps of one pass")
    add("--rounds", type=int, default=5, help="number of updates that are measured")


def measure(options: argparse.Namespace) -> Record:
    """Measure the update without change, and with one setting changed at a time."""
    require_positive(options, "rows", "micro_batch_size", "rounds")
    # before a process is started for it, whose traceback would hide the reason
    folder = str(require_policy(options.policy))
    size = options.micro_batch_size
    ways = {
        "as_it_is": Way(micro_batch_size=size),
        "no_entropy": Way(micro_batch_size=size, with_entropy=False),
        "small_passes": Way(micro_batch_size=max(1, size // 4)),
        "checkpointing": Way(micro_batch_size=size, with_checkpointing=True),
    }
    results: dict[str, Any] = {
        "rows": options.rows,
        "micro_batch_size": size,
        "rounds": options.rounds,
    }
    context = multiprocessing.get_context("spawn")
    for name, way in ways.items():
        # a process for each: peak memory never falls again within one
        with context.Pool(1) as process:
            rates, peak = process.apply(run_way, (folder, way, options.rows, options.rounds))
        results[f"{name}_rows_per_processor_s"] = spread(rates, 1)
        results[f"{name}_peak_gib"] = round(peak, 2)
    return record("update", options, results)


def run_way(folder: str, way: Way, rows: int, rounds: int) -> tuple[list[float], float]:
    """Return rows per processor second of every round, and the process's peak memory in GiB."""
    torch.set_num_threads(1)
    policy = load_policy(folder)
    if way.with_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    update = update_of(policy, way, rows)
    # the first one warms up
    seconds = [timed(update) for _ in range(1 + rounds)][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_PER_GIB
    return [rows / s.processor for s in seconds], peak


def update_of(policy: TrainablePolicy, way: Way, rows: int) -> Callable[[], float]:
    """Return a function that computes the gradient of ``rows`` random rows and returns its norm."""
    shape = policy.shape
    random = torch.Generator().manual_seed(0)
    size = (rows, *shape.image_shape)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=random)
    action_tokens = torch.randint(0, shape.num_bins, (rows, shape.num_tokens), generator=random)
    advantage = torch.randn(rows, generator=random)
    prompt = policy.processor.prompt(INSTRUCTION)
    mask = torch.ones_like(action_tokens, dtype=torch.bool)
    weight = torch.full((rows,), 1.0 / action_tokens.numel())

    def update() -> float:
        policy.model.zero_grad()
        for start in range(0, rows, way.micro_batch_size):
            part = slice(start, start + way.micro_batch_size)
            prompts = [prompt] * len(action_tokens[part])
            logits = policy.logits(images[part], prompts, action_tokens[part])
            device = logits.device
            log_probs = log_prob(logits, action_tokens[part].to(device), 1.0)
            if way.with_entropy:
                # as the engine does for its metric
                with torch.no_grad():
                    entropy(logits, 1.0).sum().item()
            old, gain, seen, weights = (
                t.to(device)
                for t in (log_probs.detach(), advantage[part], mask[part], weight[part])
            )
            policy_loss(log_probs, old, gain, seen, weights, ClipRange()).loss.backward()
        trained = [p.grad for p in policy.model.parameters() if p.grad is not None]
        # exact, so that the norm does not depend on the order of the weights
        return math.fsum(float(gradient.norm()) ** 2 for gradient in trained) ** 0.5

    return update
