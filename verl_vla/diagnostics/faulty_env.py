"""An environment that dies now and then, for the soak."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import Observation
from verl_vla.envs.base import ChunkResult, Env, EnvFactory, Snapshot


@dataclass(slots=True)
class CrashingEnv:
    """Wraps an environment; now and then it raises, or its process is killed."""

    inner: Env
    crash_share: float
    """Of the first chunks of episodes; each process crashes at its 1 / ``crash_share``-th."""
    _num_first_chunks: int = 0

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        """See `verl_vla.envs.base.Env`."""
        return self.inner.reset(task_id, init_state_id)

    def step_chunk(self, actions: npt.NDArray[np.float32]) -> ChunkResult:
        """Die, or go on.

        Raises:
            RuntimeError: this is one of the episodes that crash.
        """
        if self._num_first_chunks * self.crash_share >= 1:
            if os.getpid() % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a crash of the soak")
        return self.inner.step_chunk(actions)

    def snapshot(self) -> Snapshot:
        """See `verl_vla.envs.base.Env`."""
        return self.inner.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """See `verl_vla.envs.base.Env`."""
        self._num_first_chunks += snapshot.num_steps == 0
        self.inner.restore(snapshot)

    def close(self) -> None:
        """See `verl_vla.envs.base.Env`."""
        self.inner.close()


def make_crashing(factory: EnvFactory, crash_share: float) -> CrashingEnv:
    """Make what ``factory`` makes, fragile."""
    return CrashingEnv(factory(), crash_share)
