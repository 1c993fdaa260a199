"""Memory that simulators take in one process, which loads nothing else, as a pool's workers."""

from __future__ import annotations

from pathlib import Path

from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import make_libero_env

SMAPS = Path("/proc/self/smaps_rollup")
PRIVATE = ("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")
"""Entries of `SMAPS`, kB, that add up to the unique set size: pages that no other process maps."""
KIB, MB = 1024, 1_000_000


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
