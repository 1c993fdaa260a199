"""Progress from the simulator's state: the upper bound for rewards that are computed from images.

It is for benchmarks and experiments only: it uses information that a real robot does not have.
"""

from __future__ import annotations

import numpy as np

from verl_vla.core.errors import ConfigError
from verl_vla.rewards import Need, RewardResult, StatelessReward, TrajectoryBatch, goal_progress


class OracleReward(StatelessReward):
    """A reward of 1 for a success, and of ``alpha`` times the final true progress for a failure."""

    # only a simulator has goal readings, so the reward is for simulation only
    requires: frozenset[Need] = frozenset({"goals"})

    def __init__(self, alpha: float = 0.6) -> None:
        """Set the scale of failures.

        Args:
            alpha: score of the best possible failure, in (0, 1).

        Raises:
            ConfigError: ``alpha`` outside its range.
        """
        if not 0 < alpha < 1:
            raise ConfigError(f"alpha is {alpha}; a failure must be worth more than 0, less than 1")
        self._alpha = alpha

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode independently of the others."""
        assert batch.goals is not None
        progress = np.array([goal_progress(readings)[-1] for readings in batch.goals])
        # alpha is below 1, so no failure outranks a success
        score = np.where(batch.success, 1.0, self._alpha * progress)
        return RewardResult(
            score=score.astype(np.float32),
            progress=np.where(batch.success, 1.0, progress).astype(np.float32),
            status=tuple("success" if solved else "shaped" for solved in batch.success),
        )
