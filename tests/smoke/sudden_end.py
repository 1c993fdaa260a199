"""Work that ends in the middle, in a process of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import NoReturn


def in_a_process_of_its_own(work: Callable[[], int]) -> int:
    """The exit code of ``work`` in a fork of this process, or minus the signal that killed it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        os._exit(work())
    finally:
        os._exit(99)


def die(*_: object) -> NoReturn:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives that")
