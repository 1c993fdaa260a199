"""1 for a solved task, 0 otherwise: the reward every other one is compared with."""

from __future__ import annotations

import numpy as np

from verl_vla.rewards import RewardResult, StatelessReward, TrajectoryBatch


class BinaryReward(StatelessReward):
    """Reads the simulator's own success flag; has no parameters."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode by its outcome alone."""
        return RewardResult(
            score=batch.success.astype(np.float32),
            progress=batch.success.astype(np.float32),
            status=tuple("success" if solved else "failure" for solved in batch.success),
        )
