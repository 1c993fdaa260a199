"""Scripted experts for the mini suite, which read object poses that no policy sees.

An expert is a small state machine: a target for the gripper, followed proportionally. Its actions
stay off the bounds, since values that sit on a bound fall into one bin and teach a token policy
nothing about their neighbours. Rotations are never commanded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verl_vla.envs.mini.problem import CUBE_HALF_M, PLATE_HALF_HEIGHT_M, TABLE_M
from verl_vla.envs.simulator import Simulator
from verl_vla.errors import ConfigError

Floats = npt.NDArray[np.float64]

OPEN, CLOSED = -1.0, 1.0
FASTEST = 0.9
"""No component of a commanded translation exceeds it."""
GAIN = 40.0
"""Action per metre of error; an action of 1 asks for 0.05 m."""
CLOSING_STEPS = 5
"""The fingers meet a cube after four."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How an expert moves."""

    pace: float = 0.8
    """Largest commanded translation, of 1."""
    noise: float = 0.0
    """Standard deviation of what is added to the executed translations, but not to the labels:
    the expert is seen to correct its mistakes."""

    def __post_init__(self) -> None:
        if not 0 < self.pace <= FASTEST:
            raise ConfigError(f"pace is {self.pace}; it must be above 0 and at most {FASTEST}")
        if self.noise < 0:
            raise ConfigError(f"noise is {self.noise}; it must be at least 0")


class Expert(ABC):
    """Solves one task from any of its starts; make a new one for each episode."""

    def __init__(self, simulator: Simulator, pace: float) -> None:
        self._simulator = simulator
        self._pace = pace

    @abstractmethod
    def act(self) -> Floats:
        """Return the action [7] for this moment; call it once a step."""

    def _move(self, target: Floats, gripper: float) -> Floats:
        error = target - self._simulator.gripper_position()
        action = np.zeros(7)
        action[:3] = np.clip(GAIN * error, -self._pace, self._pace)
        action[6] = gripper
        return action


class Push(Expert):
    """Pushes an object away from the robot, with closed fingers."""

    CONTACT_M = CUBE_HALF_M + 0.022
    """From the object's centre to the gripper's while pushing."""

    def __init__(self, simulator: Simulator, pace: float, *, item: str) -> None:
        super().__init__(simulator, pace)
        self._item = item
        self._is_behind = False

    def act(self) -> Floats:
        """Go behind the object, then through it."""
        item = self._simulator.object_position(self._item)
        gripper = self._simulator.gripper_position()
        height = TABLE_M + CUBE_HALF_M + 0.005
        behind = np.array([item[0] - self.CONTACT_M - 0.015, item[1], height])
        if abs(gripper[1] - item[1]) < 0.008 and gripper[2] < height + 0.02:
            self._is_behind = True
        if not self._is_behind:
            return self._move(behind, CLOSED)
        ahead = np.array([gripper[0] + 1.0, item[1], height])
        return self._move(ahead, CLOSED)


class Pick(Expert):
    """Grasps an object from above and lifts it."""

    HOVER_M = 0.075
    """Height over the grasp from which the gripper comes down."""

    def __init__(
        self, simulator: Simulator, pace: float, *, item: str, grasp_m: float = 0.0
    ) -> None:
        """Grasp ``item`` at ``grasp_m`` above its centre."""
        super().__init__(simulator, pace)
        self._item = item
        self._grasp_m = grasp_m
        self._steps_closing: int | None = None

    def act(self) -> Floats:
        """Come down over the object, close, lift."""
        item = self._simulator.object_position(self._item)
        grasp = item + [0.0, 0.0, self._grasp_m]
        gripper = self._simulator.gripper_position()
        if self._steps_closing is None:
            if np.linalg.norm(grasp[:2] - gripper[:2]) > 0.008 or gripper[2] > grasp[2] + 0.01:
                return self._move(self._funnel(grasp, self.HOVER_M), OPEN)
            self._steps_closing = 0
        self._steps_closing += 1
        if self._steps_closing <= CLOSING_STEPS:
            return self._move(grasp, CLOSED)
        return self._carry(gripper, item)

    def _carry(self, gripper: Floats, item: Floats) -> Floats:
        return self._move(gripper + [0.0, 0.0, 1.0], CLOSED)

    def _funnel(self, goal: Floats, hover_m: float) -> Floats:
        """Return ``goal``, raised by up to ``hover_m`` as long as the gripper is not over it."""
        aside = np.linalg.norm(goal[:2] - self._simulator.gripper_position()[:2])
        rise = hover_m * np.clip((aside - 0.01) / 0.03, 0.0, 1.0)
        return goal + [0.0, 0.0, rise]


class Place(Pick):
    """Picks an object up and puts it onto another one."""

    CARRY_M = 0.03
    """Height over the goal at which the object travels."""

    def __init__(
        self, simulator: Simulator, pace: float, *, item: str, onto: str, height_m: float
    ) -> None:
        """Put ``item`` down with its centre ``height_m`` above that of ``onto``."""
        super().__init__(simulator, pace, item=item)
        self._onto = onto
        self._height_m = height_m
        self._is_high = False

    def _carry(self, gripper: Floats, item: Floats) -> Floats:
        goal = self._simulator.object_position(self._onto) + [0.0, 0.0, self._height_m]
        if item[2] > goal[2] + 0.015:
            self._is_high = True
        if not self._is_high:
            return self._move(np.array([*gripper[:2], goal[2] + 1.0]), CLOSED)
        over = self._funnel(goal + gripper - item, self.CARRY_M)
        is_down = np.linalg.norm(goal - item) < 0.008
        return self._move(over, OPEN if is_down else CLOSED)


EXPERTS: Mapping[str, Callable[[Simulator, float], Expert]] = {
    "push_the_red_cube_onto_the_green_marker": lambda sim, pace: Push(sim, pace, item="red_cube"),
    "lift_the_red_cube": lambda sim, pace: Pick(sim, pace, item="red_cube"),
    "put_the_red_cube_on_the_white_plate": lambda sim, pace: Place(
        sim,
        pace,
        item="red_cube",
        onto="white_plate",
        height_m=CUBE_HALF_M + PLATE_HALF_HEIGHT_M,
    ),
    "stack_the_red_cube_on_the_blue_cube": lambda sim, pace: Place(
        sim, pace, item="red_cube", onto="blue_cube", height_m=2 * CUBE_HALF_M
    ),
    "lift_the_can": lambda sim, pace: Pick(sim, pace, item="can", grasp_m=0.01),
    "lift_the_milk_carton": lambda sim, pace: Pick(sim, pace, item="milk", grasp_m=0.05),
}
"""The expert of each task, by the task's name."""
