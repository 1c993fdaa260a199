"""Distance from the gripper to the object that it must move, with a bonus for solving the task.

It is a dense signal for a policy that never succeeds: groups of such a policy have an advantage
where the outcome gives none. It does not replace a base policy that sometimes succeeds.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import GoalReadings
from verl_vla.core.errors import ConfigError
from verl_vla.rewards import Need, RewardResult, StatelessReward, TrajectoryBatch, smallest_reach

Form = Literal["minimum", "potential"]
"""Form of the reward. ``minimum``: the negative of the smallest distance of the episode.
``potential``: the decrease of the distance from the start to the end, which is the sum of a
potential-based shaping term without discounting and keeps the best policy (Ng, Harada, Russell
1999)."""


class ReachingReward(StatelessReward):
    """A reward of distances in metres; they are small compared with the bonus for a success."""

    requires: frozenset[Need] = frozenset({"goals"})

    def __init__(self, form: Form = "minimum", success_score: float = 10.0) -> None:
        """Set the form and the bonus.

        Args:
            form: see `Form`.
            success_score: bonus for a solved task.

        Raises:
            ConfigError: an unknown form, or a bonus that is not positive.
        """
        if form not in get_args(Form):
            raise ConfigError(f"form is {form!r}; choose 'minimum' or 'potential'")
        if success_score <= 0:
            raise ConfigError(f"success_score is {success_score}; set more than 0")
        self._form = form
        self._success_score = success_score

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode independently of the others."""
        assert batch.goals is not None
        reached = np.array([self._reached(readings) for readings in batch.goals])
        score = reached + self._success_score * batch.success
        return RewardResult(
            score=score.astype(np.float32),
            progress=reached.astype(np.float32),
            status=tuple("success" if solved else "shaped" for solved in batch.success),
            # minimum is never above 0, potential can be: the bound of this batch covers both
            max_score=self._success_score + float(max(reached.max(initial=0.0), 0.0)),
        )

    def _reached(self, readings: GoalReadings) -> float:
        distance: npt.NDArray[np.float64] = smallest_reach(readings)
        # with phi = -distance and no discount, the terms phi(t + 1) - phi(t) add up to this
        if self._form == "potential":
            return float(distance[0] - distance[-1])
        return -float(distance.min())
