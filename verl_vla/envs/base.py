"""What a simulator must look like.

An environment plays one episode at a time and can be put back to any moment of any episode of
its suite by a `Snapshot`. Snapshots are plain values: a pool may keep them, send them to another
process and go on there, and the numbers stay the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from verl_vla.played import GoalReadings, Observation, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of one episode, complete: continuing from it equals never having stopped."""

    task_id: int
    num_steps: int
    """Simulator steps the policy has chosen so far; settling steps are not counted."""
    state: Any
    """What the environment needs to continue; picklable, made of numpy arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkResult:
    """What became of one action chunk."""

    executed: int
    """How many actions ran, 1..K; fewer than K only where the episode ended inside the chunk."""
    outcome: Outcome | None
    """`SUCCESS` or `TIMEOUT` where the episode ended, else None. A success at any step of the
    chunk ends the episode there."""
    observation: Observation | None
    """What the policy sees next; None where the episode ended."""
    goals: GoalReadings
    """[2, G, 3], before the chunk and after it."""
    ending: npt.NDArray[np.uint8] | None = None
    """[V, H, W, 3], what was to be seen after the last step, as in an observation; None where the
    episode goes on, or where the environment was not told to draw it."""


class Env(Protocol):
    """One simulator of a suite."""

    def reset(self, task_id: int, init_state_id: int) -> Observation:
        """Start an episode from a recorded init state, settle, and return the first observation."""
        ...

    def step_chunk(self, actions: npt.NDArray[np.float32]) -> ChunkResult:
        """Run ``actions`` [K, A] open loop until they are used up or the episode ends.

        Raises:
            ContractError: the episode has already ended, or ``actions`` has a wrong shape.
        """
        ...

    def snapshot(self) -> Snapshot:
        """Return this moment of the current episode."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from ``snapshot``, whoever made it."""
        ...

    def close(self) -> None:
        """Free the simulator."""
        ...


EnvFactory = Callable[[], Env]
"""Makes an environment inside a worker process; must be picklable (a `functools.partial`)."""
