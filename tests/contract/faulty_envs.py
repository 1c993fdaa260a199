"""Environments that go wrong, each in one way, for the tests of the pool."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np

from verl_vla.core.episode import Observation
from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import ChunkResult
from verl_vla.envs.fake import ACTION_DIM, FakeEnv, FakeEnvConfig

CONFIG = FakeEnvConfig(image_size=16)

FAULTY_TASK = 3
"""Its init state i is the i-th of `FAULTS`; the other tasks are those of the fake environment."""

FAULTY_ACTION = 100.0
"""An action whose last value is this plus i is the i-th of `FAULTS`."""


class FaultyEnv(FakeEnv):
    """Goes wrong as it is told by the start or by the action."""

    def __init__(self) -> None:
        super().__init__(CONFIG)

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        if task_id == FAULTY_TASK:
            _faults()[init_state_id]()
        return super().reset(task_id, init_state_id)

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        if actions[0, -1] >= FAULTY_ACTION:
            _faults()[int(actions[0, -1] - FAULTY_ACTION)]()
        return super().step_chunk(actions)


class FailsOnce(FakeEnv):
    """Dies at the first reset of all processes that share ``mark``."""

    def __init__(self, mark: Path) -> None:
        super().__init__(CONFIG)
        self._mark = mark

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        if not self._mark.exists():
            self._mark.touch()
            os._exit(7)
        return super().reset(task_id, init_state_id)


class FailsEverywhere(FakeEnv):
    """Raises at every reset, as one whose renderer is missing would."""

    def __init__(self) -> None:
        super().__init__(CONFIG)

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        raise OSError("libEGL.so.1 is missing")


class Telling(FakeEnv):
    """Tells which process it lives in; takes its time for a step."""

    def __init__(self) -> None:
        super().__init__(CONFIG)

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        time.sleep(0.2)
        return super().step_chunk(actions)

    def _observe(self) -> Observation:
        seen = super()._observe()
        known = ("OMP_NUM_THREADS", "LP_NUM_THREADS", "MUJOCO_GL", "MADE_FOR")
        environment = " ".join(f"{name}={os.environ[name]}" for name in known)
        return Observation(
            image=seen.image, proprio=seen.proprio, instruction=f"pid={os.getpid()} {environment}"
        )


def refuse() -> NoReturn:
    raise ConfigError("suite is 'libero_spatail'; did you mean 'libero_spatial'?")


def raise_at_start() -> NoReturn:
    raise OSError("libEGL.so.1 is missing")


def faulty_start(fault: str) -> int:
    """The init state of `FAULTY_TASK` that brings about ``fault``."""
    return list(FAULTS).index(fault)


def faulty_chunk(fault: str) -> np.ndarray:
    """An action chunk that brings about ``fault``."""
    chunk = np.zeros((8, ACTION_DIM), dtype=np.float32)
    chunk[:, -1] = FAULTY_ACTION + list(FAULTS).index(fault)
    return chunk


def _faults() -> list:
    return list(FAULTS.values())


def _raise() -> NoReturn:
    raise FloatingPointError("the arm left the solar system")


def _exit() -> NoReturn:
    os._exit(7)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash() -> None:
    ctypes.string_at(0)


def _ask() -> None:
    input("Do you want to specify a custom path? (Y/N): ")


def _hang_for_ever() -> NoReturn:
    while True:
        time.sleep(3600)


def _chatter() -> None:
    sys.stdout.write("chatter " * 250_000)
    sys.stderr.write("\nthis is the last line\n")


FAULTS = {
    "raise": _raise,
    "exit": _exit,
    "kill": _kill,
    "crash": _crash,
    "ask": _ask,
    "hang": _hang_for_ever,
    "chatter": _chatter,
}
"""What can go wrong. ``chatter`` writes two megabytes and does no harm."""
