"""Scripted experts for the mini suite, which read object poses that no policy sees.

An expert is a small state machine whose states set a target for the gripper, which is followed
proportionally. Its actions stay below the bounds, since values on a bound all fall into one bin and
teach a token policy nothing about the neighbouring bins. Rotations are never commanded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from verl_vla.envs.experts.motion import CLOSED, GAIN, OPEN, Expert, Floats
from verl_vla.envs.mini import CUBE_HALF_M, PLATE_HALF_HEIGHT_M

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

CLOSING_STEPS = 5
"""Number of steps for closing; the fingers meet a cube after four."""
MISSED_M = 0.1
"""Distance of the gripper past an object, or above it after closing, at which it was missed."""


class MiniExpert(Expert):
    """An expert that can be biased, with an error in the heights that it assumes for objects."""

    def __init__(
        self, simulator: Simulator, pace: float, height_error_m: float, *, item: str
    ) -> None:
        """Make an expert for one episode.

        Args:
            simulator: source of the objects' poses.
            pace: largest translation in each direction, at most 1.
            height_error_m: error that is added to the height of every object; 0 makes it exact.
            item: name of the object to be moved.
        """
        super().__init__(simulator, pace)
        self._height_error = np.array([0.0, 0.0, height_error_m])
        self._item = item

    def _place_of(self, item: str) -> Floats:
        """Return the position, [3] m, that the expert assumes for an object."""
        return self._simulator.object_position(item) + self._height_error

    def _move(self, target: Floats, gripper: float) -> Floats:
        error = target - self._simulator.gripper_position()
        action = np.zeros(7)
        action[:3] = np.clip(GAIN * error, -self._pace, self._pace)
        action[6] = gripper
        return action


class Push(MiniExpert):
    """Expert that pushes an object away from the robot, with closed fingers."""

    BEHIND_M = CUBE_HALF_M + 0.037
    """Distance from object to gripper before the push, centre to centre; fingers are 0.02 m thick.
    """
    ABOVE_CENTRE_M = 0.005
    """Height of the fingertips over the object's centre."""

    def __init__(
        self, simulator: Simulator, pace: float, height_error_m: float, *, item: str
    ) -> None:
        super().__init__(simulator, pace, height_error_m, item=item)
        self._is_behind = False

    def act(self) -> Floats:
        """Move behind the object, then forward through its position."""
        item = self._place_of(self._item)
        height = item[2] + self.ABOVE_CENTRE_M
        gripper = self._simulator.gripper_position()
        # once and for all: the push moves the object, so this is not true for long
        if abs(gripper[1] - item[1]) < 0.008 and gripper[2] < height + 0.02:
            self._is_behind = True
        # a metre ahead is never reached, so the hand moves on at full pace
        x = gripper[0] + 1.0 if self._is_behind else item[0] - self.BEHIND_M
        return self._move(np.array([x, item[1], height]), CLOSED)

    def has_missed(self) -> bool:
        """Return True once the gripper has passed the object."""
        ahead = self._simulator.gripper_position() - self._place_of(self._item)
        return bool(ahead[0] > MISSED_M)


class Pick(MiniExpert):
    """Expert that grasps an object from above and lifts it."""

    HOVER_M = 0.075
    """Height over the grasp from which the gripper comes down."""

    def __init__(
        self,
        simulator: Simulator,
        pace: float,
        height_error_m: float,
        *,
        item: str,
        grasp_m: float = 0.0,
    ) -> None:
        """Grasp ``item`` at ``grasp_m`` above its centre."""
        super().__init__(simulator, pace, height_error_m, item=item)
        self._grasp_m = grasp_m
        self._steps_closing: int | None = None

    def act(self) -> Floats:
        """Come down over the object, close the fingers, lift."""
        item = self._place_of(self._item)
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

    def has_missed(self) -> bool:
        """Return True once the fingers have closed and the gripper has left the object below."""
        above = self._simulator.gripper_position() - self._place_of(self._item)
        return self._steps_closing is not None and bool(above[2] > self._grasp_m + MISSED_M)

    def _carry(self, gripper: Floats, item: Floats) -> Floats:
        return self._move(gripper + [0.0, 0.0, 1.0], CLOSED)

    def _funnel(self, goal: Floats, hover_m: float) -> Floats:
        """Return ``goal``, raised by up to ``hover_m`` while the gripper is not yet above it."""
        aside = np.linalg.norm(goal[:2] - self._simulator.gripper_position()[:2])
        rise = hover_m * np.clip((aside - 0.01) / 0.03, 0.0, 1.0)
        return goal + [0.0, 0.0, rise]


class Place(Pick):
    """Expert that picks an object up and puts it onto another one."""

    CARRY_M = 0.03
    """Height over the goal at which the object travels."""

    def __init__(
        self,
        simulator: Simulator,
        pace: float,
        height_error_m: float,
        *,
        item: str,
        onto: str,
        height_m: float,
    ) -> None:
        """Put ``item`` down with its centre ``height_m`` above that of ``onto``."""
        super().__init__(simulator, pace, height_error_m, item=item)
        self._onto = onto
        self._height_m = height_m
        self._is_high = False

    def _carry(self, gripper: Floats, item: Floats) -> Floats:
        goal = self._place_of(self._onto) + [0.0, 0.0, self._height_m]
        # once and for all: it comes down again with the object
        if item[2] > goal[2] + 0.015:
            self._is_high = True
        if not self._is_high:
            return self._move(np.array([*gripper[:2], goal[2] + 1.0]), CLOSED)
        # the hand is off the object's centre by `gripper - item`
        over = self._funnel(goal + gripper - item, self.CARRY_M)
        is_down = np.linalg.norm(goal - item) < 0.008
        return self._move(over, OPEN if is_down else CLOSED)


EXPERTS: Mapping[str, Callable[[Simulator, float, float], MiniExpert]] = {
    "push_the_red_cube_onto_the_green_marker": partial(Push, item="red_cube"),
    "lift_the_red_cube": partial(Pick, item="red_cube"),
    "put_the_red_cube_on_the_white_plate": partial(
        Place,
        item="red_cube",
        onto="white_plate",
        height_m=CUBE_HALF_M + PLATE_HALF_HEIGHT_M,
    ),
    "stack_the_red_cube_on_the_blue_cube": partial(
        Place, item="red_cube", onto="blue_cube", height_m=2 * CUBE_HALF_M
    ),
    "lift_the_can": partial(Pick, item="can", grasp_m=0.01),
    "lift_the_milk_carton": partial(Pick, item="milk", grasp_m=0.05),
    "push_the_blue_cube_onto_the_green_marker": partial(Push, item="blue_cube"),
}
"""Constructor of each task's expert, by the task's name; its arguments are the simulator, the pace
and the height error."""
