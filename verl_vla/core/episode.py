"""What is played: where an episode starts, what is seen of it, and how it ends.

Needs no torch, whose import would cost each simulator process seconds and hundreds of megabytes.
Everybody else takes these names from `verl_vla.core.tables`, where the letters of the shapes stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

GoalReadings = npt.NDArray[np.float32]
"""[..., G, 3], what a simulator knows about each of the G goals of its task, by `Reading`."""


class Outcome(IntEnum):
    """How an episode ended. A crash is not a failure of the policy and is never trained on."""

    SUCCESS = 0
    TIMEOUT = 1
    CRASH = 2


class Reading(IntEnum):
    """The columns of `GoalReadings`. Rewards may ask for them; a policy never sees them."""

    REACH = 0
    """From the gripper to what must be moved, m."""
    REMAINING = 1
    """From there to where the goal wants it, m; of a joint, how far it must still go, m or rad."""
    HOLDS = 2
    """1 where the simulator calls the goal reached, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSpec:
    """Where one episode starts, whom it is compared with, and its place in the run's noise."""

    task_id: int
    """Index of the task in its suite."""
    init_state_id: int
    """Index of the recorded start in its task; decided by the run, never by an environment."""
    group_id: int
    """Episodes with the same group id are compared with each other."""
    episode_id: int
    """Unique in the run; the sampling noise of an episode is a function of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the policy sees before one policy step."""

    image: npt.NDArray[np.uint8]
    """[V, H, W, 3] RGB, upright, through `verl_vla.core.image_preprocessing.prepare_image`."""
    proprio: npt.NDArray[np.float32]
    """[P] end-effector position (m), axis-angle (rad), gripper joints (m); not normalised."""
    instruction: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One init state of one task, from which episodes start."""

    task_id: int
    init_state_id: int
