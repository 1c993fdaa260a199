"""Progress of an episode, computed from the simulator's state and not from images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import GoalReadings, Reading

SMALLEST_START = 1e-3
"""Distance in metres or radians; a part that starts nearer than this has no distance to cover, and
counts 0."""


def goal_progress(readings: GoalReadings) -> npt.NDArray[np.float64]:
    """Measure progress along one episode.

    A goal that holds counts 1. Any other goal counts the mean of two parts, each the share of its
    initial distance that has been covered: from the gripper to the object, and from the object to
    its goal position. Goals are averaged.

    Args:
        readings: [T, G, 3].

    Returns:
        [T], 0 to 1; 1 only where every goal holds.
    """
    distances = readings[..., [Reading.REACH, Reading.REMAINING]].astype(np.float64)
    first = distances[:1]
    # a part without distance to cover would divide by 0, and counts 0
    covered = np.where(first > SMALLEST_START, 1 - distances / np.maximum(first, SMALLEST_START), 0)
    # an object that was pushed away covers less than nothing, and counts 0
    parts = covered.clip(0, 1).mean(axis=-1)
    return np.where(readings[..., Reading.HOLDS] > 0, 1.0, parts).mean(axis=-1)


def smallest_reach(readings: GoalReadings) -> npt.NDArray[np.float64]:
    """Return the distance from the gripper to the nearest object that must still be moved.

    Args:
        readings: [T, G, 3].

    Returns:
        [T] metres; 0 where nothing is left to do.
    """
    reach = readings[..., Reading.REACH].astype(np.float64)
    waiting = readings[..., Reading.HOLDS] == 0
    # a goal that holds needs no reach
    nearest = np.where(waiting, reach, np.inf).min(axis=-1)
    return np.where(waiting.any(axis=-1), nearest, 0.0)
