"""Estimate memory, disk space and time of a recipe.

Nothing is started; the policy's weights and a GPU are not needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from verl_vla.config.choices import GPUS
from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.core.errors import ConfigError
from verl_vla.core.text import TextTable, format_seconds
from verl_vla.diagnostics.planning.kernels import (
    Kernels,
    attention_path,
    fusible_share,
    kernels_of,
    micro_batches,
)
from verl_vla.diagnostics.planning.memory import micro_batch_rows, rollout_batch
from verl_vla.diagnostics.planning.plan import Plan, host_cores, make_plan
from verl_vla.diagnostics.planning.remedies import find_remedy
from verl_vla.diagnostics.planning.trace import PROMPT_TOKENS
from verl_vla.envs.registry import suite
from verl_vla.policies.base import ModelConfig
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig
from verl_vla.policies.registry import load_config, require_valid
from verl_vla.rl.setup import find_policy, find_unnorm_key
from verl_vla.runs.terminal import show_table
from verl_vla.trainer.dry_run.job import Job, replay, weightless_checkpoint
from verl_vla.trainer.dry_run.phases import Replay

EXIT_TOO_LARGE = 1
"""Exit code if the recipe does not fit."""
GB, TERA = 1e9, 1e12


def run(options: argparse.Namespace) -> int:
    """Print the plan; return 1 if it does not fit."""
    overrides = list(options.overrides)
    if options.num_nodes is not None:
        overrides.append(f"cluster.num_nodes={options.num_nodes}")
    recipe = load_recipe(overrides)
    # nothing is asked of this machine: the plan is for the one that will train
    if options.gpu is None and recipe.cluster.device != "cpu":
        raise ConfigError(f"which GPU? Say --gpu and one of {', '.join(GPUS)}")
    config, source = policy_config(recipe)
    plan = make_plan(recipe, config, None if options.gpu is None else GPUS[options.gpu])
    if options.kernels and plan.gpu is None:
        raise ConfigError(
            "--kernels needs the speeds of a GPU, and the recipe's ranks run on cores; choose a "
            "profile with a GPU, such as profile=8gpu, and --gpu"
        )
    kernels = kernels_of(plan, config) if options.kernels else None
    if options.json:
        listed = {} if kernels is None else {"kernels": [*map(asdict, kernels)]}
        print(json.dumps(plan.as_json() | listed))
        return 0 if plan.fits else EXIT_TOO_LARGE
    print(f"policy: {source}")
    show(plan)
    if kernels is not None:
        show_kernels(plan, kernels)
    if options.replay:
        result = replay_plan(plan, config)
        show_replay(result)
        return 0 if result.fits else EXIT_TOO_LARGE
    if plan.fits:
        return 0
    remedy = find_remedy(plan, config)
    if remedy is None:
        print("No change that is known here makes it fit; take a larger GPU.")
    else:
        changes, changed = remedy
        overrides = [f"{name}={str(value).lower()}" for name, value in changes.items()]
        print(f"It would with {' '.join(overrides)}: {changed.device.peak / GB:.1f} GB.")
    return EXIT_TOO_LARGE


def policy_config(recipe: Recipe) -> tuple[ModelConfig, str]:
    """Return the configuration of the recipe's policy, and a description of its source.

    If the recipe's folder is not on this machine, the sizes of the policy published for the suite
    are used.
    """
    try:
        folder = find_policy(recipe.policy.path)
    except ConfigError:
        sizes = suite(recipe.environment.suite).policy_sizes
        source = f"{recipe.policy.path} is not here; OpenVLA-OFT as published"
        return OpenVLAOFTConfig(**sizes), source
    config = load_config(folder)
    # headers alone: a plan takes a second, and 15 GB of weights half a minute
    require_valid(folder, _unnorm_key(recipe, folder), reads_values=False)
    return config, str(folder)


def _unnorm_key(recipe: Recipe, folder: Path) -> str | None:
    return find_unnorm_key(folder, recipe.policy.unnorm_key, suite(recipe.environment.suite))


def show(plan: Plan) -> None:
    """Print memory, disk and time, part by part."""
    trace, cluster = plan.trace, plan.recipe.cluster
    print(
        f"weights: {trace.weights / 1e6:,.1f} M, {trace.trained / 1e6:,.1f} M of them trained\n"
        f"ranks: {cluster.num_nodes} x {cluster.ranks_per_node}\n"
        f"one round: at most {plan.policy_steps:,} policy steps\n"
    )
    device = plan.device
    totals = {phase: device.allocated(phase) for phase in device.phases}
    _table("tensors of the first rank, GB" if plan.gpu else "tensors of a rank, GB", totals)
    _table(f"the largest, {device.largest}, holds", device.phases[device.largest])
    if plan.gpu is not None:
        _table("beside its tensors", {**device.outside, "fragments": device.fragmented})
        print(f"assumed of PyTorch's allocator: {device.allocator}")
    print(f"peak {plan.device.peak / GB:.1f} GB", end="")
    if plan.gpu is not None:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        print(f" of {plan.gpu.memory_bytes / GB:.1f} GB of an {plan.gpu.name}: {verdict}", end="")
    print("\n")
    _table("memory of a node's host, GB", plan.host)
    print(f"together {sum(plan.host.values()) / GB:.1f} GB\n")
    print(f"cores of a node's host: {host_cores(plan.recipe)}\n")
    _table("disk of the run's folder, GB", plan.disk)
    print(f"together {sum(plan.disk.values()) / GB:.1f} GB\n")
    if plan.gpu is None:
        print("time on cores is not planned; docs/benchmarks.md has what was measured")
        return
    print("time of a training step with one round, from published speeds")
    for name, seconds in plan.seconds.items():
        print(f"  {name:<28} {format_seconds(seconds):>9}")
    print(f"together {format_seconds(plan.total_seconds)}; simulators and policy play side by side")


def show_kernels(plan: Plan, kernels: Sequence[Kernels]) -> None:
    """Print the classes of kernels of an optimizer step, the slowest first."""
    total = sum(part.seconds for part in kernels)
    rows = [
        [
            part.name,
            f"{part.flops / TERA:,.1f}",
            f"{part.bytes / GB:,.1f}",
            f"{part.link_bytes / GB:,.1f}",
            f"{part.seconds:.2f}",
            f"{part.seconds / total:.1%}",
        ]
        for part in kernels
    ]
    size, number = plan.recipe.optimizer.micro_batch_size, micro_batches(plan)
    print(f"\nkernels of an optimizer step of a rank: {number} micro-batches of {size} rows")
    show_table(
        TextTable(
            ["", "TFLOP", "GB moved", "GB received", "seconds", "share"],
            rows,
            notes=[
                f"together {total:.2f} s: computed from the GPU's peak FLOPs and bandwidths, not "
                "measured, as if nothing overlapped",
                f"attention of the language model: {attention_path(plan)}",
                "fusing norms, elementwise operators and copies into other kernels would save at "
                f"most {fusible_share(kernels):.1%}",
            ],
        )
    )


def replay_plan(plan: Plan, config: ModelConfig) -> Replay:
    """Run a training step of one rank of ``plan`` at its full size, without a GPU.

    Raises:
        ConfigError: the plan has no GPU, or the dry run cannot be built here.
    """
    recipe = plan.recipe
    if plan.gpu is None:
        raise ConfigError(
            "--replay replays what a GPU's memory holds, and the recipe's ranks run on cores; "
            "choose a profile with a GPU, such as profile=8gpu, and --gpu"
        )
    with TemporaryDirectory() as scratch:
        folder = _policy_folder(recipe, config, Path(scratch))
        policy = replace(recipe.policy, unnorm_key=_unnorm_key(recipe, folder))
        job = Job(
            recipe=replace(recipe, policy=policy),
            policy_folder=folder,
            rollout_rows=rollout_batch(recipe),
            micro_batches=micro_batch_rows(recipe),
            prompt_tokens=PROMPT_TOKENS,
        )
        # what others hold of the device is missing to the rank's allocator
        outside = sum(plan.device.outside.values())
        return replay(job, plan.gpu.memory_bytes - outside)


def _policy_folder(recipe: Recipe, config: ModelConfig, scratch: Path) -> Path:
    try:
        return find_policy(recipe.policy.path)
    except ConfigError:
        assert isinstance(config, OpenVLAOFTConfig), "`policy_config` takes the published sizes"
        return weightless_checkpoint(config, suite(recipe.environment.suite), scratch)


def show_replay(result: Replay) -> None:
    """Print what the allocator did, phase by phase."""
    columns = ("allocated", "reserved", "fragmented", "free", "host")
    heads = "".join(f"{name:>11}" for name in columns)
    print(f"\n{'replayed without a GPU, GB':<38}{heads}{'TFLOP':>9}")
    for phase in result.phases:
        sizes = (phase.allocated, phase.reserved, phase.fragmented, phase.free, phase.host)
        row = "".join(f"{size / GB:11.2f}" for size in sizes)
        print(f"  {phase.name:<36}{row}{phase.flops / TERA:9.1f}")
    if result.out_of_memory is None:
        print("every phase fitted")
    else:
        print(f"the last phase DID NOT FIT: {result.out_of_memory}")


def _table(title: str, parts: Mapping[str, Any]) -> None:
    print(title)
    for name, size in parts.items():
        print(f"  {name:<28} {size / GB:9.2f}")
