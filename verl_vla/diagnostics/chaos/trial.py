"""One training of the trials: started, watched, ended, with its processes and its folder.

All trials start from the same folder, that of an undisturbed run, cut back to `BASE_STEP`. They
train to the undisturbed run's last step, so that their numbers can be compared with its numbers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.core.processes import descendants, is_alive, kill, start_time

BASE_STEP, LAST_STEP = 2, 4
LOADING = "starting the learner"
"""Line of a training before it loads the learner."""
START_LIMIT_S = 600.0
"""Time within which a training must reach its gate, s."""
END_LIMIT_S = 300.0
"""Time that a disturbed training is watched, s; one that has not ended by then hangs."""
CHILDREN_LIMIT_S = 120.0
"""Time that the processes of an ended training are watched, s."""
POLL_S = 0.02
NOTE_EVERY_S = 0.25
"""Time between two looks at the processes of a training, s."""
HANGS = -1000
"""Stands for the exit code of a training that did not end; signals are -1 to -64."""

PROGRAM = (sys.executable, "-m", "verl_vla", "train")
WORDS = (
    "recipe=quickstart",
    "seed=21",
    "environment.tasks=[0]",
    "environment.step_limit=16",
    "cold_start.mode=off",
    "sampling.groups_per_step=2",
    "sampling.group_size=4",
    "sampling.max_rounds=1",
    "sampling.dynamic=false",
    "optimizer.num_mini_batches=1",
    f"trainer.total_training_steps={LAST_STEP}",
    "trainer.save_every=1",
    "trainer.eval_every=0",
    "trainer.eval_before=false",
)
"""A training of seconds a step; its groups are never too alike to be trained on."""

REWARD = """
import time
from pathlib import Path

import numpy as np
from rewards.reaching import ReachingReward

GATE = Path(__file__).with_name("gate")


class TrialReward(ReachingReward):
    def __call__(self, batch):
        result = super().__call__(batch)
        GATE.with_name("reached").touch()
        while GATE.exists():
            time.sleep(0.02)
        pass  # FAULT
        return result
"""
FAULT_LINE = "pass  # FAULT"
NO_MEMORY_MONITOR = {"RAY_memory_monitor_refresh_ms": "0"}
"""Variable by which Ray ends nobody where other programs fill this machine's memory."""


class NoMomentError(RuntimeError):
    """The end of a training before the moment at which it was to be disturbed."""


class Trial:
    """A training in a folder of its own.

    Args:
        root: folder of all trials.
        name: name of the trial.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.folder = root / re.sub(r"\W+", "_", name)
        self.reward = root / "reward.py"
        self.output = root / f"{self.folder.name}.txt"
        """What its processes print."""
        self.process: subprocess.Popen[bytes] | None = None
        self._children: dict[int, int | None] = {}

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return self.folder / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.checkpoints / f"global_step_{step}"

    @property
    def pid(self) -> int:
        """Process id of the training."""
        assert self.process is not None, "it was not started"
        return self.process.pid

    @property
    def reached(self) -> Path:
        """File that the reward touches when it is asked."""
        return self._gate("reached")

    def said(self) -> str:
        """Return what its processes have printed."""
        return self.output.read_text()

    def start(self, words: Sequence[str] = (), reward_line: str = FAULT_LINE) -> None:
        """Start the training in a process group of its own."""
        self.reward.write_text(REWARD.replace(FAULT_LINE, reward_line))
        self.reached.unlink(missing_ok=True)
        command = [*WORDS, f"reward='{self.reward}:TrialReward'", f"out='{self.folder}'", *words]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*PROGRAM, *command],
                cwd=PROJECT_FOLDER,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **NO_MEMORY_MONITOR},
            )

    def await_gate(self, *, is_early: bool = False) -> None:
        """Wait until the reward is asked, and note the processes of the training.

        Args:
            is_early: wait only until the learner is loaded.

        Raises:
            NoMomentError: the training ended before.
        """
        self.await_moment(self._is_loading if is_early else self.reached.exists)
        self._note_children()

    def _is_loading(self) -> bool:
        return LOADING in self.said()

    def await_moment(self, has_come: Callable[[], bool]) -> None:
        """Wait for a moment of the training.

        Raises:
            NoMomentError: the training ended before, or it did not come.
        """
        assert self.process is not None, "it was not started"
        deadline = time.monotonic() + START_LIMIT_S
        while not has_come():
            if self.process.poll() is not None or time.monotonic() > deadline:
                last = self.said().splitlines()[-1:]
                raise NoMomentError(f"the moment for the fault did not come: {last}")
            time.sleep(POLL_S)

    def close_gate(self) -> None:
        """Let the reward wait when it is asked."""
        self._gate("gate").touch()

    def open_gate(self) -> None:
        """Let the reward answer."""
        self._gate("gate").unlink(missing_ok=True)

    def find(self, part: str) -> int:
        """Return the process of the training with ``part`` in its command line.

        Raises:
            NoMomentError: there is none.
        """
        for pid in self._children:
            try:
                shown = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                # it has ended since
                continue
            if part in shown:
                return pid
        raise NoMomentError(f"the training has no process {part!r}")

    def await_end(self, limit_s: float = END_LIMIT_S) -> int:
        """Wait for the end of the training; return its exit code, or `HANGS`."""
        assert self.process is not None, "it was not started"
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self._note_children()
            try:
                return self.process.wait(NOTE_EVERY_S)
            except subprocess.TimeoutExpired:
                continue
        return HANGS

    def await_children(self) -> float | None:
        """Wait for the end of the noted processes; return the seconds, or None if one is left."""
        began = time.monotonic()
        while self._left():
            if time.monotonic() - began > CHILDREN_LIMIT_S:
                return None
            time.sleep(POLL_S)
        return time.monotonic() - began

    def kill_all(self) -> None:
        """End what is left of the training."""
        if self.process is not None:
            self._note_children()
            # first, or it would start others in their place
            self.process.kill()
            for pid in self._left():
                kill(pid)
            self.process.wait()
            # a busy machine takes a moment
            self.await_children()

    def _note_children(self) -> None:
        for pid in descendants(self.pid):
            self._children[pid] = start_time(pid)

    def _left(self) -> list[int]:
        """Return the noted processes that live; their ids may be those of others by now."""
        return [
            pid
            for pid, started in self._children.items()
            if is_alive(pid) and start_time(pid) == started
        ]

    def _gate(self, name: str) -> Path:
        return self.reward.with_name(name)


def train_undisturbed(root: Path) -> Trial:
    """Train to the last step without a fault, keeping every checkpoint.

    Raises:
        ConfigError: it does not end as it should.
    """
    trial = Trial(root, "undisturbed")
    trial.start([f"trainer.keep_checkpoints={LAST_STEP}"])
    try:
        code = trial.await_end(START_LIMIT_S)
    finally:
        trial.kill_all()
    if code:
        raise ConfigError(
            f"the undisturbed training ended with {code}; see {trial.output}, and mend that first"
        )
    return trial


def copy_base(undisturbed: Trial, trial: Trial) -> None:
    """Make the folder of a trial: the undisturbed run's, stopped after `BASE_STEP`."""
    shutil.copytree(undisturbed.folder, trial.folder, symlinks=True)
    for step in range(BASE_STEP + 1, LAST_STEP + 1):
        shutil.rmtree(trial.checkpoint(step))
    (trial.checkpoints / "latest").unlink()
    (trial.checkpoints / "latest").symlink_to(trial.checkpoint(BASE_STEP).name)
