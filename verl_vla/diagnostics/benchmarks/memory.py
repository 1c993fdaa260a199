"""Benchmark of the memory that the simulators of a suite take, in a process of their own."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from verl_vla.config.choices import SUITES
from verl_vla.core.signals import end_with_parent
from verl_vla.diagnostics.benchmarks.measuring import (
    Record,
    record,
    require_positive,
    require_scene,
    spread,
)
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.memory import sizes_by_task
from verl_vla.envs.libero.suite import make_libero_env


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--suite", choices=SUITES, default="libero_spatial")
    add("--num-tasks", type=int, default=10, help="tasks whose simulators are built")
    add("--render-size", type=int, default=256, help="height and width of an image, pixels")


def measure(options: argparse.Namespace) -> Record:
    """Measure the unique set size of one process after each task's first image."""
    require_positive(options, "num_tasks", "render_size")
    num_tasks = min(options.num_tasks, len(require_scene(options.suite).tasks))
    config = EnvConfig(
        suite=options.suite,
        render_size=options.render_size,
        # all are kept, so that each size counts the simulators before it too
        max_simulators=num_tasks,
    )
    factory = partial(make_libero_env, config)
    # spawned: a forked process would hold torch and all else that this one has loaded
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        sizes = pool.submit(sizes_by_task, factory, num_tasks).result()
    further = [after - before for before, after in zip(sizes, sizes[1:], strict=False)]
    return record(
        "memory",
        options,
        {
            "suite": options.suite,
            "tasks": len(sizes),
            "render_size": options.render_size,
            "with_its_first_task_mb": sizes[0],
            "each_further_task_mb": spread(further, 0) if further else None,
        },
    )
