"""Estimate memory, disk space and time of a recipe.

Nothing is started; the policy's weights and a GPU are not needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.core.errors import ConfigError
from verl_vla.core.text import format_seconds
from verl_vla.diagnostics.planning.gpus import GPUS
from verl_vla.diagnostics.planning.host import as_json, host_cores
from verl_vla.diagnostics.planning.plan import Plan, make_plan
from verl_vla.diagnostics.planning.remedies import find_remedy
from verl_vla.envs.registry import suite
from verl_vla.policies.base import ModelConfig
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig
from verl_vla.policies.registry import load_config
from verl_vla.rl.setup import find_policy

EXIT_TOO_LARGE = 1
"""Exit code if the recipe does not fit."""
GB = 1e9


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
    if options.json:
        print(json.dumps(as_json(plan)))
        return 0 if plan.fits else EXIT_TOO_LARGE
    print(f"policy: {source}")
    show(plan)
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
    return load_config(folder), str(folder)


def show(plan: Plan) -> None:
    """Print memory, disk and time, part by part."""
    trace, cluster = plan.trace, plan.recipe.cluster
    print(
        f"weights: {trace.weights / 1e6:,.1f} M, {trace.trained / 1e6:,.1f} M of them trained\n"
        f"ranks: {cluster.num_nodes} x {cluster.ranks_per_node}\n"
        f"one round: at most {plan.policy_steps:,} policy steps\n"
    )
    _table(
        "memory of the first rank, GB" if plan.gpu else "memory of a rank, GB", plan.device.lasting
    )
    _table("and the largest of", plan.device.passing)
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


def _table(title: str, parts: Mapping[str, Any]) -> None:
    print(title)
    for name, size in parts.items():
        print(f"  {name:<28} {size / GB:9.2f}")
