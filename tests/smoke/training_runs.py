"""A real run of the command line, for the tests of this folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
RUN_LIMIT_S = 900
"""Start-up is most of it; a loaded machine may need three times as long."""
RATIO_TOLERANCE = 1e-3
"""The first mini-batch is scored by the weights that acted, in 16 bits as in 32."""
SECRET = "hf_thisIsNoToken0123456789"
"""What stands in the environment of every run, and nowhere else."""


class TrainingRun:
    """One ``python -m verl_vla`` process of a verb with recipes, and its run folder."""

    def __init__(self, folder: Path, words: list[str], verb: str = "train") -> None:
        self.folder = folder
        self.words = [verb, *words, f"out='{folder}'"]

    def start(self) -> subprocess.Popen[str]:
        """Start it in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "verl_vla", *self.words],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET},
        )

    def finish(self, exit_code: int = 0) -> str:
        """Run it to its end, which must come with ``exit_code``, and return what it said."""
        return self.await_end(self.start(), exit_code)

    def await_end(self, process: subprocess.Popen[str], exit_code: int) -> str:
        """Wait for the end of ``process``, which must come with ``exit_code``; what it said."""
        try:
            said, _ = process.communicate(timeout=RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == exit_code, said
        return said

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Run it until ``condition`` holds, then kill the process without warning."""
        process = self.start_until(condition)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def disturb_when(self, condition: Callable[[], bool], disturb: Callable[[], None]) -> str:
        """Run it until ``condition`` holds, ``disturb`` it, and return what it said to its end."""
        process = self.start_until(condition)
        disturb()
        return self.await_end(process, 0)

    def start_until(self, condition: Callable[[], bool]) -> subprocess.Popen[str]:
        """Start it and wait until ``condition`` holds."""
        process = self.start()
        deadline = time.monotonic() + RUN_LIMIT_S
        while not condition():
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.02)
        return process


def corrupt(file: Path) -> None:
    """Turn one bit of ``file``, as a disk may."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
