"""What every scripted expert shares: a target for the gripper, followed proportionally."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

Floats = npt.NDArray[np.float64]

OPEN, CLOSED = -1.0, 1.0
GAIN = 40.0
"""Action per metre of error; an action of 1 asks for 0.05 m."""


class Expert(ABC):
    """Solves one task from any of its starts; make a new one for each episode."""

    def __init__(self, simulator: Simulator, pace: float) -> None:
        """Make one.

        Args:
            simulator: where the objects are.
            pace: the largest translation of an action, of 1.
        """
        self._simulator = simulator
        self._pace = pace

    @abstractmethod
    def act(self) -> Floats:
        """Return the action [7] for this moment; call it once a step."""

    @abstractmethod
    def has_missed(self) -> bool:
        """Whether it goes on without the object."""

    @property
    def has_finished(self) -> bool:
        """Whether it would do nothing more once the task is solved."""
        return True
