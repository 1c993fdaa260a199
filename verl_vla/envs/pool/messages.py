"""What a pool and its simulator processes say to each other.

Messages are pickled over a socket pair between a pool and processes it started itself; nothing
that comes from outside is ever unpickled. Images do not travel in messages: each slot has a frame
in memory that both sides map, and whoever answers for the slot has written there first.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import GoalReadings, Outcome
from verl_vla.core.errors import ConfigError, ContractError, EpisodeCrashed

STACK_SIGNAL = signal.SIGUSR1
"""Upon this signal a worker writes to its output where it is."""

Frames = npt.NDArray[np.uint8]
"""[slots, V, H, W, 3], the newest image of every slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The first message to a worker."""

    factory: bytes
    """A pickled `verl_vla.envs.base.EnvFactory`; opened only after the worker can report."""
    frames_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartEpisode:
    """Ask for the first observation of a recorded start."""

    slot: int
    task_id: int
    init_state_id: int

    def __str__(self) -> str:
        return f"task {self.task_id}, init state {self.init_state_id}, reset"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepChunk:
    """Ask what becomes of an action chunk."""

    slot: int
    task_id: int
    init_state_id: int
    num_steps: int
    """Steps the episode has behind it."""
    snapshot: bytes
    """A pickled `Snapshot`; sealed, since only environments look inside."""
    actions: npt.NDArray[np.float32]
    """[K, A]"""

    def __str__(self) -> str:
        return f"task {self.task_id}, init state {self.init_state_id}, step {self.num_steps}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Ask a worker to free its simulators and exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The environment is made; requests may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where an episode stands. The image is in the slot's frame."""

    snapshot: bytes
    proprio: npt.NDArray[np.float32]
    """[P], as in `Observation`."""
    instruction: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Answer to `StartEpisode`."""

    moment: Moment
    busy_s: float
    """Seconds the worker spent on the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Answer to `StepChunk`."""

    executed: int
    outcome: Outcome | None
    moment: Moment | None
    """None where the episode ended."""
    has_final_image: bool
    """Whether the slot's frame shows how it ended."""
    goals: GoalReadings
    busy_s: float


RequestError = ConfigError | ContractError | EpisodeCrashed
"""A mistake of the caller, a mistake of the code, or a simulator that raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Answer to anything that could not be done.

    After an `EpisodeCrashed` the worker leaves, since its simulator may be in any state.
    """

    error: RequestError


Request = StartEpisode | StepChunk
Result = Started | Stepped | Failed
"""What became of a request."""
Reply = Ready | Result


def map_frames(descriptor: int, shape: tuple[int, ...]) -> Frames:
    """View the memory behind ``descriptor`` as ``shape``; it lives as long as the array."""
    return np.frombuffer(mmap.mmap(descriptor, math.prod(shape)), dtype=np.uint8).reshape(shape)


def make_frames_file(shape: tuple[int, ...]) -> int:
    """Make memory for frames and return its descriptor.

    An anonymous file rather than a named block: it is gone with the last process that maps it,
    however that process died, and the size of ``/dev/shm`` does not bound it.
    """
    descriptor = os.memfd_create("verl_vla_frames")
    os.ftruncate(descriptor, math.prod(shape))
    return descriptor
