"""Types of one episode: its start, its observations and its outcome.

Needs no torch, whose import would cost each simulator process seconds and hundreds of megabytes.
The letters in the shapes are defined in `verl_vla.core.tables`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

GoalReadings = npt.NDArray[np.float32]
"""[..., G, 3], a simulator's readings of each of the G goals of its task; columns: `Reading`."""


class Outcome(IntEnum):
    """The end of an episode. A crash is not a failure of the policy and is never trained on."""

    SUCCESS = 0
    TIMEOUT = 1
    CRASH = 2


class Reading(IntEnum):
    """The columns of `GoalReadings`. Rewards may read them; a policy never sees them."""

    REACH = 0
    """Distance from the gripper to the object that must be moved, m."""
    REMAINING = 1
    """Distance from that object to its goal, m; for a joint, the travel that is left, m or rad."""
    HOLDS = 2
    """1 where the simulator says that the goal is reached, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSpec:
    """The start of one episode, the group it is compared within, and the key of its noise."""

    task_id: int
    """Index of the task in its suite."""
    init_state_id: int
    """Index of the recorded init state in its task; the run decides it, never an environment."""
    group_id: int
    """Episodes with the same group id are compared with each other."""
    episode_id: int
    """Number that is unique in the run; an episode's sampling noise is a function of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Input of the policy for one policy step."""

    image: npt.NDArray[np.uint8]
    """[V, H, W, 3] RGB, upright, made by `verl_vla.core.image_preprocessing.prepare_image`."""
    proprio: npt.NDArray[np.float32]
    """[P] end-effector position (m), axis-angle (rad), gripper joints (m); not normalised."""
    instruction: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One init state of one task, from which episodes start."""

    task_id: int
    init_state_id: int
