"""How near the gripper came to what it must move, and a bonus for solving the task.

A dense signal for a policy that never succeeds: it gives the groups of such a policy an advantage
where the outcome gives none. It is no substitute for a base that sometimes succeeds.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import GoalReadings
from verl_vla.core.errors import ConfigError
from verl_vla.rewards import Need, RewardResult, StatelessReward, TrajectoryBatch, smallest_reach

Form = Literal["minimum", "potential"]
"""``minimum``: the negative of the smallest distance of the episode. ``potential``: what the
distance lost from the start to the end, the sum of a potential-based shaping term without
discounting, which leaves the best policy as it is (Ng, Harada, Russell 1999)."""


class ReachingReward(StatelessReward):
    """Distances in metres, so that a success outweighs any of them."""

    requires: frozenset[Need] = frozenset({"goals"})

    def __init__(self, form: Form = "minimum", success_score: float = 10.0) -> None:
        """Make one.

        Args:
            form: see `Form`.
            success_score: what is added for a solved task.

        Raises:
            ConfigError: an unknown form, or a success that is worth nothing.
        """
        if form not in get_args(Form):
            raise ConfigError(f"form is {form!r}; choose 'minimum' or 'potential'")
        if success_score <= 0:
            raise ConfigError(f"success_score is {success_score}; set more than 0")
        self._form = form
        self._success_score = success_score

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode by itself."""
        assert batch.goals is not None
        reached = np.array([self._reached(readings) for readings in batch.goals])
        score = reached + self._success_score * batch.success
        return RewardResult(
            score=score.astype(np.float32),
            progress=reached.astype(np.float32),
            status=tuple("success" if solved else "shaped" for solved in batch.success),
            max_score=self._success_score + float(max(reached.max(initial=0.0), 0.0)),
        )

    def _reached(self, readings: GoalReadings) -> float:
        distance: npt.NDArray[np.float64] = smallest_reach(readings)
        if self._form == "potential":
            return float(distance[0] - distance[-1])
        return -float(distance.min())
