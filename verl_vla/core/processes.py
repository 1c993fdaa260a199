"""The processes of this machine, as Linux lists them, and an end that no thread can delay."""

from __future__ import annotations

import os
import signal
import sys

# by a name of its own: os._exit itself is refused while a plug-in runs
from os import _exit as exit_now
from pathlib import Path
from typing import NoReturn

PROC = Path("/proc")
ENDED = "Z"
"""State of a process that has ended and whose parent has not asked how."""


def descendants(root: int) -> list[int]:
    """Return the processes that ``root`` has started, directly or not; the youngest first."""
    parents = {pid: name_and_parent(pid)[1] for pid in pids()}
    found: list[int] = []
    above = {root}
    while below := {pid for pid, parent in parents.items() if parent in above}:
        found += sorted(below)
        above = below
    return found[::-1]


def pids() -> list[int]:
    """Return all processes."""
    return [int(folder.name) for folder in PROC.iterdir() if folder.name.isdecimal()]


def name_and_parent(pid: int) -> tuple[str, int | None]:
    """Return a process's name and the id of its parent; an empty name and None where it is gone."""
    stat = _stat(pid)
    if stat is None:
        return "", None
    # "1 (name) S 0 ...": a name may hold spaces and brackets
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    return name, int(stat[stat.rindex(")") + 2 :].split()[1])


def is_alive(pid: int) -> bool:
    """Return true for a process that has not ended."""
    stat = _stat(pid)
    return stat is not None and stat[stat.rindex(")") + 2] != ENDED


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks; None where it is gone.

    With its id this names a process for ever; ids alone are given to others again.
    """
    stat = _stat(pid)
    # field 22 of proc(5); the first after the name is the third
    return None if stat is None else int(stat[stat.rindex(")") + 2 :].split()[19])


def end_now(message: str, exit_code: int) -> NoReturn:
    """End this process and all that it has started, whatever its other threads do."""
    assert sys.__stderr__ is not None
    # not through logging: the main thread may hold its lock
    os.write(sys.__stderr__.fileno(), f"{message}\n".encode())
    for pid in descendants(os.getpid()):
        kill(pid)
    # the interpreter's own end would wait for threads that wait for other processes
    exit_now(exit_code)


def kill(pid: int) -> None:
    """Kill a process, which may have ended already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        # it has ended since it was listed
        return


def _stat(pid: int) -> str | None:
    try:
        return (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        # it has ended since it was listed
        return None
