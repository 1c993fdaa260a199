"""Run many episodes of the mini suite with crashing simulators, and check for leaks.

Prints a line per block and writes one JSON object; the exit code is 1 if memory or open files grew
beyond a bound.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import require_place
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
"""Sampling temperature, as in the quickstart."""
TIMEOUT_S = 120.0
"""Timeout of a simulator in seconds, as in the profile of two cores."""
EXIT_GREW = 1


def run(options: argparse.Namespace) -> int:
    """Run the episodes, measure the growth, and return 1 if it exceeds a bound."""
    for name in ("episodes", "block", "step_limit", "num_workers", "num_slots"):
        if getattr(options, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is {getattr(options, name)}; set at least 1")
    if not 0 <= options.crash_share < 1:
        raise ConfigError(f"--crash-share is {options.crash_share}; set a share, e.g. 0.01")
    require_place(Path(options.out), "--out")
    began = time.perf_counter()
    samples = _play(options)
    grown = growth(samples)
    record = {
        "episodes": samples[-1].episodes,
        "crashes": samples[-1].crashes,
        "crash_share": options.crash_share,
        "wall_s": round(time.perf_counter() - began, 1),
        "tasks": options.tasks,
        "step_limit": options.step_limit,
        "num_workers": options.num_workers,
        "num_slots": options.num_slots,
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


def _play(options: argparse.Namespace) -> list[Sample]:
    torch.set_num_threads(1)
    policy = load_policy(find_policy(options.policy))
    env = EnvironmentConfig(suite="mini", step_limit=options.step_limit)
    config, shape = env_config(env, policy.processor), policy.shape
    chosen = suite("mini")
    played = starts(chosen, task_ids(chosen, options.tasks), "train")
    with EnvPool(
        partial(make_crashing, partial(make_libero_env, config), options.crash_share),
        num_workers=options.num_workers,
        num_slots=options.num_slots,
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
