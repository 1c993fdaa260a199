"""The scene of a pick-and-place expert, read from the running simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError
from verl_vla.envs.experts.boxes import Boxes, boxes_of, colliding_geoms

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

Floats = npt.NDArray[np.float64]

HAND = "gripper0_hand_collision"
FINGERS = ("gripper0_finger1_collision", "gripper0_finger2_collision")
"""Names of the geoms in robosuite 1.4.0, ``models/assets/grippers/panda_gripper.xml``."""
SPACING_M = 0.01
"""Distance between the points of a path at which obstacles are looked for."""


class Scene:
    """The object to be moved, its goal and the obstacles, at the simulator's current moment."""

    def __init__(self, simulator: Simulator) -> None:
        """Read the task's goal.

        Raises:
            ConfigError: the goal is not one object in or on one place.
        """
        self._simulator = simulator
        self._model: Any = simulator.model
        self._data: Any = simulator.data
        goal = simulator.goal
        if len(goal) != 1 or len(goal[0]) != 3 or goal[0][0] not in ("in", "on"):
            raise ConfigError(
                f"the goal is {goal}, and the expert only moves one object into or onto one place; "
                "choose a task that asks for that"
            )
        _, self._item, self._place = goal[0]
        # all bodies of one object, however it is jointed, have the same root
        roots = np.array(self._model.body_rootid)
        is_robot = roots == roots[self._model.site_bodyid[simulator.gripper_site]]
        is_item = roots == roots[simulator.body(self._item)]
        self._item_geoms = colliding_geoms(self._model, is_item)
        self._other_geoms = colliding_geoms(self._model, ~is_item & ~is_robot)
        self._hand = self._hand_from_site([HAND])
        self._fingers = self._hand_from_site(FINGERS)

    @property
    def item(self) -> Boxes:
        """The object to be moved."""
        return boxes_of(self._model, self._data, self._item_geoms)

    @property
    def item_position(self) -> Floats:
        """Position of the object in the sense of LIBERO's success test, [3] m."""
        return self._simulator.object_position(self._item)

    @property
    def others(self) -> Boxes:
        """Everything but the object to be moved and the robot."""
        return boxes_of(self._model, self._data, self._other_geoms)

    @property
    def goal_position(self) -> Floats:
        """Middle of the surface that the object is to be put on, [3] m."""
        if self._simulator.has_site(self._place):
            site = self._model.site(self._place)
            middle = np.array(self._data.site_xpos[site.id])
            # half the height of the turned box: the third row gives each edge's vertical share
            half = float(np.abs(self._data.site_xmat[site.id][6:] * site.size).sum())
            # a container's floor reaches above the site's lower side, so its real height is looked
            # up; only below the site's middle, else a lid would be taken for the floor
            below = self.others.between(-np.inf, float(middle[2]))
            floor = max(middle[2] - half, below.tops_over(middle[None, :2], 0.0)[0])
            return np.array([*middle[:2], floor])
        middle = self._simulator.object_position(self._place)
        return np.array([*middle[:2], self.others.tops_over(middle[None, :2], 0.0)[0]])

    @property
    def fingers_below_m(self) -> float:
        """Distance by which the fingertips reach below the point between them, m."""
        return float(self._fingers[1, 2])

    @property
    def hand_above_m(self) -> float:
        """Height of the hand's lower side above the point between the fingertips, m."""
        return float(-self._hand[1, 2])

    @property
    def hand_half_m(self) -> float:
        """Half the length of the hand along the direction in which the fingers move, m."""
        return float(np.abs(self._hand[:, 0]).max())

    def highest_on_the_way(self, start: Floats, end: Floats, margin: float) -> float:
        """Return the greatest height of other things on a straight path between two points, m.

        The points are [2] or longer. Minus infinity where there is nothing.
        """
        count = max(2, int(np.linalg.norm(end[:2] - start[:2]) / SPACING_M))
        return float(self.others.tops_over(np.linspace(start[:2], end[:2], count), margin).max())

    def _hand_from_site(self, names: Sequence[str]) -> Floats:
        """Return the bounds [2, 3] of parts of the hand, in the frame of the gripper's site, m."""
        geoms = np.array([self._model.geom(name).id for name in names])
        corners = boxes_of(self._model, self._data, geoms).corners.reshape(-1, 3)
        seen = (corners - self._simulator.gripper_position()) @ self._simulator.gripper_rotation()
        return np.stack([seen.min(0), seen.max(0)])
