"""Placement of a task's fixtures: cabinets, stoves and racks.

LIBERO samples where fixtures stand at every reset, within about 2 cm, and writes it into MuJoCo's
model. It is no part of an init state. Importing this module imports robosuite and LIBERO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from robosuite.utils.errors import RandomizationError

from verl_vla.envs.libero.controller_kernels import Floats
from verl_vla.envs.libero.problems import BUILDS_OF_FIRST_RESET, continued


@dataclass(frozen=True, slots=True)
class FixturePlacement:
    """Poses of all F fixtures of a task, in the order of its problem."""

    position_m: Floats
    """[F, 3]"""
    quaternion: Floats
    """[F, 4] (w, x, y, z)"""


class FixtureSampler:
    """Places where the resets of a stock environment put the fixtures of one problem.

    openvla-oft's evaluation seeds one environment per task and resets it for each episode, so the
    placement of an episode depends on the resets before it, and on nothing else.
    """

    def __init__(self, problem: Any, random_state: dict[str, Any]) -> None:
        """Take a problem that was reset once.

        Args:
            problem: a LIBERO environment without its wrapper.
            random_state: state of numpy's global generator after the first reset.
        """
        self._problem = problem
        self._model: mujoco.MjModel = problem.sim.model._model
        bodies = [problem.obj_body_id[name] for name in problem.fixtures_dict]
        # the type is said for a problem without fixtures
        self._bodies = np.array(bodies, dtype=np.intp)
        self._random_state = random_state
        kept = problem.object_property_initializers
        self._properties = kept[: len(kept) // BUILDS_OF_FIRST_RESET]
        self._num_builds = BUILDS_OF_FIRST_RESET
        self._of_resets = [self.placement]

    @property
    def placement(self) -> FixturePlacement:
        """Where the fixtures stand now."""
        # an array as index makes copies
        return FixturePlacement(
            self._model.body_pos[self._bodies], self._model.body_quat[self._bodies]
        )

    @placement.setter
    def placement(self, placement: FixturePlacement) -> None:
        self._model.body_pos[self._bodies] = placement.position_m
        self._model.body_quat[self._bodies] = placement.quaternion

    @property
    def first(self) -> FixturePlacement:
        """Where the first reset puts the fixtures."""
        return self._of_resets[0]

    def of_reset(self, index: int) -> FixturePlacement:
        """Return where a reset puts the fixtures, counted from 0; the current episode is lost."""
        while len(self._of_resets) <= index:
            self.placement = self._of_resets[-1]
            with continued(self._random_state):
                self._reset()
                self._random_state = np.random.get_state(legacy=False)
            self._of_resets.append(self.placement)
        return self._of_resets[index]

    def _reset(self) -> None:
        """Reset as a stock environment would next, until the objects find room."""
        kept = self._problem.object_property_initializers
        is_placed = False
        while not is_placed:
            # a stock environment builds its model again, and lists its properties once more
            self._num_builds += 1
            self._problem.object_property_initializers = self._properties * self._num_builds
            try:
                self._problem.reset()
                is_placed = True
            except RandomizationError:
                # LIBERO's wrapper resets again too
                continue
        self._problem.object_property_initializers = kept
