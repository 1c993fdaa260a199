"""What is read of this machine's processes, from real ones."""

from __future__ import annotations

import os
import signal
import subprocess

from verl_vla.core.processes import descendants, is_alive, kill


def test_descendants_are_those_of_descendants_too() -> None:
    process = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    below = int(process.stdout.readline())
    try:
        found = descendants(os.getpid())
        # the youngest first, so that none is orphaned before it is killed
        assert found.index(below) < found.index(process.pid)
        assert descendants(process.pid) == [below]
    finally:
        os.kill(below, signal.SIGKILL)
        process.wait()


def test_a_process_that_has_ended_is_not_alive_and_can_be_killed_again() -> None:
    process = subprocess.Popen(["sleep", "60"])
    assert is_alive(process.pid)
    kill(process.pid)
    # nobody has asked how it ended yet
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(process.pid)
    process.wait()
    assert not is_alive(process.pid)
    kill(process.pid)
