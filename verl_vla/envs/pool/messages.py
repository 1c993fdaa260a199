"""Messages between a pool and its simulator processes.

Messages are pickled over a socket pair between a pool and the processes that it started; nothing
from outside is ever unpickled. What the policy sees is not part of messages: each slot has a frame
in memory that both sides map, and a worker writes the image there before it answers for the slot.
Videos, which few rewards ask for and whose length varies, are.
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
"""Signal at which a worker writes its stack trace to its output."""

Frames = npt.NDArray[np.uint8]
"""[slots, V, H, W, 3], the newest image of every slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The first message to a worker."""

    factory: bytes
    """A pickled `verl_vla.envs.base.EnvFactory`; unpickled only once the worker can report errors.
    """
    frames_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartEpisode:
    """Request for the first observation of a start."""

    slot: int
    task_id: int
    init_state_id: int

    def __str__(self) -> str:
        return f"task {self.task_id}, init state {self.init_state_id}, reset"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepChunk:
    """Request to run an action chunk from a snapshot."""

    slot: int
    task_id: int
    init_state_id: int
    num_steps: int
    """Number of steps that the episode has taken so far."""
    snapshot: bytes
    """A pickled `Snapshot`, which only an environment unpickles."""
    actions: npt.NDArray[np.float32]
    """[K, A]"""

    def __str__(self) -> str:
        return f"task {self.task_id}, init state {self.init_state_id}, step {self.num_steps}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Request to a worker to free its simulators and exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Message of a worker that its environment is made and that it can take requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The state of an episode after a request. The image is in the slot's frame."""

    snapshot: bytes
    proprio: npt.NDArray[np.float32]
    """[P], as in `Observation`."""
    instruction: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Answer to `StartEpisode`."""

    moment: Moment
    busy_s: float
    """Time that the worker spent on the request, s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Answer to `StepChunk`."""

    executed: int
    outcome: Outcome | None
    moment: Moment | None
    """None where the episode ended."""
    has_final_image: bool
    """True where the slot's frame holds the image after the episode's last step."""
    video: npt.NDArray[np.uint8] | None = None
    """See `ChunkResult.video`."""
    goals: GoalReadings
    busy_s: float


RequestError = ConfigError | ContractError | EpisodeCrashed
"""Errors that a worker sends: a wrong setting, wrong code, or a simulator that raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Answer to a request that failed.

    After an `EpisodeCrashed` the worker exits, since its simulator may be in any state.
    """

    error: RequestError


Request = StartEpisode | StepChunk
Result = Started | Stepped | Failed
"""Results of a request."""
Reply = Ready | Result


def map_frames(descriptor: int, shape: tuple[int, ...]) -> Frames:
    """Map the memory of ``descriptor`` as an array, which keeps the mapping alive."""
    return np.frombuffer(mmap.mmap(descriptor, math.prod(shape)), dtype=np.uint8).reshape(shape)


def make_frames_file(shape: tuple[int, ...]) -> int:
    """Create shared memory for frames and return its descriptor.

    It is an anonymous file, not a named block: the system frees it with the last process that maps
    it, even if that process is killed, and the size of ``/dev/shm`` does not bound it.
    """
    descriptor = os.memfd_create("verl_vla_frames")
    os.ftruncate(descriptor, math.prod(shape))
    return descriptor
