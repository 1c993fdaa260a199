"""How much memory simulators may still take, on a machine or in a container."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
KIB = 1024
UNLIMITED = "max"
"""What a control group of version 2 says where it has no limit; version 1 says a huge number."""


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Names of a version's files in a control group's folder."""

    controller: str
    """As ``/proc/self/cgroup`` names it; version 2 has no name."""
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
    """Memory that can be had without swapping, the least of machine and control groups.

    File pages that the kernel can drop count as available in both. Groups are those of this
    process and all above it, of version 1 or 2, as far as they can be seen from here.

    Args:
        proc: where the kernel's ``meminfo`` and ``self/cgroup`` are.
        cgroup: where control groups are mounted.
    """
    found = [_entry(proc / "meminfo", "MemAvailable:") * KIB]
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


def _groups(of_process: Path, mount: Path, controller: str) -> Iterator[Path]:
    """The mount itself, as a container sees its own group, and the groups of this process."""
    yield mount
    if not of_process.is_file():
        return
    for line in of_process.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = Path(path.lstrip("/"))
            yield from (mount / part for part in (group, *group.parents) if part != Path())


def _entry(file: Path, name: str) -> int:
    """The number behind a name, one pair a line.

    Raises:
        ValueError: the kernel does not say it.
    """
    for line in file.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    raise ValueError(f"{file} has no entry {name}")
