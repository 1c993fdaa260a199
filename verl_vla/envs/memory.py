"""How much memory simulators may still take, on a machine or in a container."""

from __future__ import annotations

from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
KIB = 1024
UNLIMITED = "max"
"""What a control group of version 2 says where it has no limit; version 1 says a huge number."""


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Memory that can be had without swapping, the least of machine and control group.

    File pages that the kernel can drop count as available in both.

    Args:
        proc: where the kernel's ``meminfo`` is.
        cgroup: of this process, as a container sees its own; version 1 or 2.
    """
    found = [_of_machine(proc / "meminfo")]
    for limit, usage, stat, dropped in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        files = [cgroup / name for name in (limit, usage, stat)]
        if not all(file.is_file() for file in files):
            continue
        most = files[0].read_text().strip()
        if most != UNLIMITED:
            used = int(files[1].read_text()) - _entry(files[2], dropped)
            found.append(max(0, int(most) - used))
    return min(found)


def _of_machine(meminfo: Path) -> int:
    return _entry(meminfo, "MemAvailable:") * KIB


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
