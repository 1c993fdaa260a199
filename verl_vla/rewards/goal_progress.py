"""How far an episode got, told from the simulator's own state rather than from images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import GoalReadings, Reading

SMALLEST_START = 1e-3
"""Metres or radians; what was nearer than this at the start had no way to go."""


def goal_progress(readings: GoalReadings) -> npt.NDArray[np.float64]:
    """Measure progress along one episode.

    A goal that holds counts 1. Another counts the mean of two parts, each the share of the first
    distance that has been covered: the gripper's way to the object, and the object's way to where
    the goal wants it. Goals are averaged.

    Args:
        readings: [T, G, 3].

    Returns:
        [T], 0 to 1; 1 only where every goal holds.
    """
    distances = readings[..., [Reading.REACH, Reading.REMAINING]].astype(np.float64)
    first = distances[:1]
    covered = np.where(first > SMALLEST_START, 1 - distances / np.maximum(first, SMALLEST_START), 0)
    parts = covered.clip(0, 1).mean(axis=-1)
    return np.where(readings[..., Reading.HOLDS] > 0, 1.0, parts).mean(axis=-1)


def smallest_reach(readings: GoalReadings) -> npt.NDArray[np.float64]:
    """Return how near the gripper is to the nearest object that must still be moved.

    Args:
        readings: [T, G, 3].

    Returns:
        [T] metres; 0 where nothing is left to do.
    """
    reach = readings[..., Reading.REACH].astype(np.float64)
    waiting = readings[..., Reading.HOLDS] == 0
    nearest = np.where(waiting, reach, np.inf).min(axis=-1)
    return np.where(waiting.any(axis=-1), nearest, 0.0)
