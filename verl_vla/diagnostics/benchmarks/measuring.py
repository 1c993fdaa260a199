"""Common parts of all benchmarks: alternating measurements, and the conditions of a number."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from verl_vla.core.errors import ConfigError
from verl_vla.core.provenance import provenance
from verl_vla.envs.base import EnvConfig, EnvFactory, Suite
from verl_vla.envs.libero.egl_devices import render_devices
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.envs.registry import suite
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.registry import require_valid
from verl_vla.rl.rollout import NoiseSource
from verl_vla.rl.setup import find_policy

START_LIMIT_S = 300.0
"""Seconds after which a simulator that has not started counts as lost; the default of
`EnvironmentConfig.timeout_s`."""
NOISE = NoiseSource(seed=0, stream=0)


def require_scene(name: str, task: int | None = None) -> Suite:
    """Return a suite that can be simulated here, as `train` checks it.

    Raises:
        ConfigError: its simulator or assets are missing, or it has no such task.
    """
    chosen = suite(name)
    if task is not None:
        chosen.task(task)
    chosen.require_simulator()
    return chosen


def require_policy(folder: str) -> Path:
    """Return the folder of a policy that can play, as `train` checks it.

    Raises:
        ConfigError: there is no checkpoint, or it has a fault.
    """
    found = find_policy(folder)
    require_valid(found)
    return found


def factory_of(options: argparse.Namespace, shape: PolicyShape) -> EnvFactory:
    """Return a factory of simulators of ``--suite``, with the given step limit and image sizes."""
    config = EnvConfig(
        suite=options.suite,
        step_limit=options.steps,
        render_size=options.render_size,
        image_size=shape.image_size,
    )
    return partial(make_libero_env, config)


def open_pool(
    factory: EnvFactory, shape: PolicyShape, *, num_workers: int, num_slots: int
) -> EnvPool:
    """Start ``num_workers`` processes; the pool is a context manager."""
    return EnvPool(
        factory,
        num_workers=num_workers,
        num_slots=num_slots,
        image_shape=shape.image_shape,
        timeout_s=START_LIMIT_S,
        worker_env={},
        render_devices=render_devices(),
    )


Record = dict[str, Any]
"""Results of one benchmark by name, ready for JSON, with ``bench``, ``command``, ``conditions``."""

ENVIRONMENT = ("OMP_NUM_THREADS", "LP_NUM_THREADS", "MUJOCO_GL", "CUDA_VISIBLE_DEVICES")
"""Environment variables that affect the speed."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall-clock and processor seconds of one piece of work."""

    clock: float
    processor: float
    """Processor seconds of all threads of the process; more reliable than the clock on a shared
    machine."""


def timed(work: Callable[[], object]) -> Seconds:
    """Run ``work`` once and time it."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def take_turns(
    ways: Mapping[str, Callable[[], Seconds]], *, rounds: int, warm_up: int
) -> dict[str, list[Seconds]]:
    """Measure every method ``rounds`` times, one after the other in each round.

    ``warm_up`` rounds before them fill caches and are not counted.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in ways}
    for index in range(warm_up + rounds):
        # in turns, so that a slow minute of the machine falls on all of them
        for name, work in ways.items():
            seconds = work()
            if index >= warm_up:
                taken[name].append(seconds)
    return taken


def spread(values: Sequence[float], digits: int) -> list[float]:
    """Return median, least and largest, rounded."""
    return [round(x, digits) for x in (statistics.median(values), min(values), max(values))]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return the speedup of each pair: median, least and largest."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)], 2)


def record(name: str, options: argparse.Namespace, results: Mapping[str, Any]) -> Record:
    """Put a benchmark's results together with its command and conditions."""
    return {
        "bench": name,
        "command": f"python -m verl_vla bench {shlex.join(options.arguments)}",
        **results,
        "conditions": {
            # a loaded machine explains a slow number
            "load_average_at_end": round(os.getloadavg()[0], 1),
            **{key: os.environ[key] for key in ENVIRONMENT if key in os.environ},
            **provenance(),
        },
    }


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Check that options are at least 1.

    Raises:
        ConfigError: an option is below 1.
    """
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {number}; set at least 1")
