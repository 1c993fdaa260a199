"""Benchmark of the memory that the simulators of a suite take, in a process of their own."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from verl_vla.core.signals import end_with_parent
from verl_vla.diagnostics.benchmarks.measuring import Record, record, require_positive, spread
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.names import SUITES

SMAPS = Path("/proc/self/smaps_rollup")
PRIVATE = ("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")
"""Entries of `SMAPS`, kB, that add up to the unique set size: pages that no other process maps."""
KIB, MB = 1024, 1_000_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--suite", choices=SUITES, default="libero_spatial")
    add("--num-tasks", type=int, default=10, help="tasks whose simulators are built")
    add("--render-size", type=int, default=256, help="height and width of an image, pixels")


def measure(options: argparse.Namespace) -> Record:
    """Measure the unique set size of one process after each task's first image."""
    require_positive(options, "num_tasks", "render_size")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        sizes = pool.submit(
            sizes_by_task, options.suite, options.num_tasks, options.render_size
        ).result()
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


def sizes_by_task(suite: str, num_tasks: int, render_size: int) -> list[int]:
    """Build a simulator of each of the first tasks and render its first image.

    Returns:
        The unique set size of this process after each of them, MB.
    """
    config = EnvConfig(suite=suite, render_size=render_size, max_simulators=num_tasks)
    env = make_libero_env(config)
    sizes: list[int] = []
    for task_id in range(min(num_tasks, len(env.suite.tasks))):
        env.reset(task_id, 0)
        sizes.append(unique_set_size(SMAPS.read_text()) // MB)
    env.close()
    return sizes


def unique_set_size(rollup: str) -> int:
    """Return the bytes that no other process maps, from the text of `SMAPS`."""
    rows = [line.split() for line in rollup.splitlines()]
    return sum(int(row[1]) * KIB for row in rows if row[0] in PRIVATE)
