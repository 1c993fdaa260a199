"""Memory that is available to simulators, on a machine or in a container, and that they take.

Nothing heavy is imported here: a process that measures its simulators must hold nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from verl_vla.envs.base import EnvFactory

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
SMAPS = PROC / "self" / "smaps_rollup"
PRIVATE = ("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")
"""Entries of `SMAPS`, kB, that add up to the unique set size: pages that no other process maps."""
KIB, MB = 1024, 1_000_000
UNLIMITED = "max"
"""Value of a version-2 control group's limit where there is none; version 1 has a huge number."""


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """File names in the folder of a control group, for one version of control groups."""

    controller: str
    """Name of the controller in ``/proc/self/cgroup``; empty in version 2."""
    root: str
    limit: str
    usage: str
    droppable: str
    """Entry of ``memory.stat``: file pages that the kernel can drop."""


VERSIONS = (
    _GroupFiles("", "", "memory.max", "memory.current", "inactive_file"),
    _GroupFiles(
        "memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Return the bytes that can be allocated without swapping, the least of machine and groups.

    File pages that the kernel can drop count as available in both. The control groups are that of
    this process and all above it, of version 1 or 2, as far as they are visible to this process.

    Args:
        proc: folder of the kernel's ``meminfo`` and ``self/cgroup``.
        cgroup: folder where control groups are mounted.
    """
    found = [_entry(proc / "meminfo", "MemAvailable:") * KIB]
    # a machine can have both versions at once; what is not there yields nothing
    for names in VERSIONS:
        for group in _groups(proc / "self" / "cgroup", cgroup / names.root, names.controller):
            if not all((group / name).is_file() for name in (names.limit, names.usage)):
                continue
            most = (group / names.limit).read_text().strip()
            if most != UNLIMITED:
                droppable = _entry(group / "memory.stat", names.droppable)
                used = int((group / names.usage).read_text()) - droppable
                found.append(max(0, int(most) - used))
    return min(found)


def sizes_by_task(factory: EnvFactory, num_tasks: int) -> list[int]:
    """Build a simulator of each of the first tasks and render its first image.

    Call it in a process of its own, which loads nothing else, as a pool's workers.

    Args:
        factory: makes an environment that keeps the simulators of all these tasks.
        num_tasks: number of tasks, at most those of the suite.

    Returns:
        The unique set size of this process after each of them, MB.
    """
    env = factory()
    sizes: list[int] = []
    for task_id in range(num_tasks):
        env.reset(task_id, 0)
        sizes.append(unique_set_size(SMAPS.read_text()) // MB)
    env.close()
    return sizes


def unique_set_size(rollup: str) -> int:
    """Return the bytes that no other process maps, from the text of `SMAPS`."""
    rows = [line.split() for line in rollup.splitlines()]
    return sum(int(row[1]) * KIB for row in rows if row[0] in PRIVATE)


def _groups(of_process: Path, mount: Path, controller: str) -> Iterator[Path]:
    """Yield the mount, which inside a container is its own group, and this process's groups."""
    yield mount
    if not of_process.is_file():
        return
    for line in of_process.read_text().splitlines():
        # hierarchy:controllers:path (cgroups(7))
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = Path(path.lstrip("/"))
            yield from (mount / part for part in (group, *group.parents) if part != Path())


def _entry(file: Path, name: str) -> int:
    """Return the number that follows a name in a file with one pair per line.

    Raises:
        ValueError: the file has no such name.
    """
    for line in file.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    raise ValueError(f"{file} has no entry {name}")
