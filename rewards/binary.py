"""1 for a solved task, 0 otherwise: the baseline of all other rewards."""

from __future__ import annotations

import numpy as np

from verl_vla.rewards import RewardResult, StatelessReward, TrajectoryBatch


class BinaryReward(StatelessReward):
    """A reward of the simulator's success flag, without parameters."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode by its outcome only."""
        return RewardResult(
            score=batch.success.astype(np.float32),
            progress=batch.success.astype(np.float32),
            status=tuple("success" if solved else "failure" for solved in batch.success),
        )
