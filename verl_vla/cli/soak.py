"""``soak``: play many episodes of the mini suite while simulators crash; nothing may grow.

Prints a line a block and writes one JSON object; exit code 1 where something grew beyond its bound.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from verl_vla.config.grpo import EnvironmentConfig
from verl_vla.core.errors import ConfigError
from verl_vla.core.provenance import provenance
from verl_vla.diagnostics.faulty_env import make_crashing
from verl_vla.diagnostics.soak import BOUNDS, Sample, excesses, growth, soak
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.envs.registry import suite
from verl_vla.policies.registry import load_policy
from verl_vla.rl.group_sampling import StartSampler
from verl_vla.rl.setup import env_config, find_policy, starts, task_ids

logger = logging.getLogger(__name__)

TEMPERATURE = 0.8
"""As the quickstart plays."""
TIMEOUT_S = 120.0
"""As the profile of two cores."""
EXIT_GREW = 1


def run(arguments: Sequence[str]) -> int:
    """Play, measure, judge."""
    options = _parser().parse_args(arguments)
    for name in ("episodes", "block", "limit", "workers", "slots"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; set at least 1")
    if not 0 <= options.crash_share < 1:
        raise ConfigError(f"--crash-share is {options.crash_share}; set a share, e.g. 0.01")
    began = time.perf_counter()
    samples = _play(options)
    grown = growth(samples)
    record = {
        "episodes": samples[-1].episodes,
        "crashes": samples[-1].crashes,
        "crash_share": options.crash_share,
        "wall_s": round(time.perf_counter() - began, 1),
        "tasks": options.tasks,
        "step_limit": options.limit,
        "workers": options.workers,
        "slots": options.slots,
        "growth": {name: round(value, 1) for name, value in grown.items()},
        "bounds": BOUNDS,
        "versions": provenance(),
        "samples": [_rounded(sample) for sample in samples],
    }
    Path(options.out).write_text(json.dumps(record, indent=1))
    for excess in excesses(grown):
        logger.error("%s", excess)
    logger.info("written to %s", options.out)
    return EXIT_GREW if excesses(grown) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla soak", description=__doc__)
    add = parser.add_argument
    add("--policy", default="bases/mini", help="folder of a checkpoint")
    add("--tasks", type=int, nargs="+", default=[0, 6], help="task ids of the mini suite")
    add("--episodes", type=int, default=2000, help="at least that many are played")
    add("--block", type=int, default=80, help="episodes between two samples")
    add("--limit", type=int, default=16, help="steps of an episode; few, so that many are played")
    add("--crash-share", type=float, default=0.01, help="of the episodes")
    add("--workers", type=int, default=2, help="simulator processes")
    add("--slots", type=int, default=16, help="episodes under way at the same time")
    add("--out", default="soak.json", help="file to write")
    return parser


def _play(options: argparse.Namespace) -> list[Sample]:
    torch.set_num_threads(1)
    policy = load_policy(find_policy(options.policy))
    env = EnvironmentConfig(suite="mini", step_limit=options.limit)
    config, shape = env_config(env, policy.processor), policy.shape
    chosen = suite("mini")
    played = starts(chosen, task_ids(chosen, options.tasks), "train")
    with EnvPool(
        partial(make_crashing, partial(make_libero_env, config), options.crash_share),
        num_workers=options.workers,
        num_slots=options.slots,
        image_shape=shape.image_shape,
        timeout_s=TIMEOUT_S,
        worker_env={},
    ) as pool:
        sampler = StartSampler(played, seed=0, group_size=1)
        samples: list[Sample] = []
        for sample in soak(pool, policy, sampler, block=options.block, temperature=TEMPERATURE):
            samples.append(sample)
            logger.info("%s", _rounded(sample))
            if sample.episodes >= options.episodes:
                return samples
    raise AssertionError("a soak has no end of its own")


def _rounded(sample: Sample) -> dict[str, Any]:
    return {name: round(value, 1) for name, value in asdict(sample).items()}
