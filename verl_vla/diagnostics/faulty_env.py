"""An environment that crashes at times, for the soak test."""

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
    """A wrapper of an environment that at times raises or kills its process."""

    inner: Env
    crash_share: float
    """Share of episodes that crash, at their first chunk: each process crashes in its
    1 / ``crash_share``-th episode."""
    _num_first_chunks: int = 0

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        """See `verl_vla.envs.base.Env`."""
        return self.inner.reset(task_id, init_state_id)

    def step_chunk(self, actions: npt.NDArray[np.float32]) -> ChunkResult:
        """Run a chunk, or crash.

        Raises:
            RuntimeError: the crash is due; in processes with an odd id, SIGKILL takes its place.
        """
        # the process ends with it, so the next one counts from 0
        if self._num_first_chunks * self.crash_share >= 1:
            # half of the processes die without an exception, as after a segmentation fault
            if os.getpid() % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a crash of the soak")
        return self.inner.step_chunk(actions)

    def snapshot(self) -> Snapshot:
        """See `verl_vla.envs.base.Env`."""
        return self.inner.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """See `verl_vla.envs.base.Env`."""
        # a snapshot before any step: the episode's first chunk comes next
        self._num_first_chunks += snapshot.num_steps == 0
        self.inner.restore(snapshot)

    def close(self) -> None:
        """See `verl_vla.envs.base.Env`."""
        self.inner.close()


def make_crashing(factory: EnvFactory, crash_share: float) -> CrashingEnv:
    """Make an environment with ``factory`` and wrap it."""
    return CrashingEnv(factory(), crash_share)
