"""An environment that dies now and then, for the soak."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from verl_vla.envs.base import ChunkResult, Env, EnvFactory, Snapshot
from verl_vla.types import Observation


@dataclass(slots=True)
class FragileEnv:
    """Wraps an environment; some episodes end with its process, or with an exception."""

    inner: Env
    crash_share: float
    """Of the episodes, each at its first chunk; half of them of each kind."""
    _rng: np.random.Generator = field(default_factory=np.random.default_rng)
    _is_first_chunk: bool = True

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        """See `verl_vla.envs.base.Env`."""
        return self.inner.reset(task_id, init_state_id)

    def step_chunk(self, actions: npt.NDArray[np.float32]) -> ChunkResult:
        """Die, or go on.

        Raises:
            RuntimeError: this is one of the episodes that crash.
        """
        drawn = self._rng.random()
        if self._is_first_chunk and drawn < self.crash_share / 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is_first_chunk and drawn < self.crash_share:
            raise RuntimeError("a crash of the soak")
        return self.inner.step_chunk(actions)

    def snapshot(self) -> Snapshot:
        """See `verl_vla.envs.base.Env`."""
        return self.inner.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """See `verl_vla.envs.base.Env`."""
        self._is_first_chunk = snapshot.num_steps == 0
        self.inner.restore(snapshot)

    def close(self) -> None:
        """See `verl_vla.envs.base.Env`."""
        self.inner.close()


def make_fragile(factory: EnvFactory, crash_share: float) -> FragileEnv:
    """Make what ``factory`` makes, fragile."""
    return FragileEnv(factory(), crash_share)
