"""Base of all scripted experts, which follow a target of the gripper proportionally."""

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
"""Action per metre of error; an action of 1 commands 0.05 m."""


class Expert(ABC):
    """A controller that solves one task from any of its starts; make a new one per episode."""

    def __init__(self, simulator: Simulator, pace: float) -> None:
        """Make an expert for one episode.

        Args:
            simulator: source of the objects' poses.
            pace: largest translation in an action, at most 1.
        """
        self._simulator = simulator
        self._pace = pace

    @abstractmethod
    def act(self) -> Floats:
        """Return the action [7] for this moment; call it once per step."""

    @abstractmethod
    def has_missed(self) -> bool:
        """Return True where the expert continues without having the object."""

    @property
    def has_finished(self) -> bool:
        """True where the expert has nothing left to do once the task is solved."""
        return True
