"""Control rewards that do not look at an episode; a useful reward must rank better than they do."""

from __future__ import annotations

import numpy as np

from verl_vla.rewards import Floats, RewardResult, StatelessReward, TrajectoryBatch


class ClockReward(StatelessReward):
    """The number of steps of an episode: rises along every success, without any information."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score failures by length; a failure as long as the longest episode scores 0.5."""
        steps = batch.num_steps.astype(np.float64)
        return _result(batch, steps, 0.5 * steps / steps.max(initial=1.0))


class RandomReward(StatelessReward):
    """A random number for each episode and length."""

    def __init__(self, seed: int = 0) -> None:
        """Make the reward; ``seed`` decides the numbers."""
        self._seed = seed

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score by a random number that depends on the episode only, not on the batch."""
        keys = zip(batch.episode_id.tolist(), batch.num_steps.tolist(), strict=True)
        drawn = np.array([np.random.default_rng([self._seed, *key]).random() for key in keys])
        return _result(batch, drawn, drawn)


def _result(batch: TrajectoryBatch, progress: Floats, quality: Floats) -> RewardResult:
    return RewardResult(
        score=np.where(batch.success, 1.0, quality).astype(np.float32),
        progress=progress.astype(np.float32),
        status=tuple("success" if solved else "shaped" for solved in batch.success),
    )
