"""Rewards that know nothing of what an episode shows; what they reach is worth nothing."""

from __future__ import annotations

import numpy as np

from verl_vla.rewards import Floats, RewardResult, StatelessReward, TrajectoryBatch


class ClockReward(StatelessReward):
    """How many steps an episode took: rises on every success, and says nothing."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score by length; the longest failure of the batch is worth half a success."""
        steps = batch.num_steps.astype(np.float64)
        return _result(batch, steps, 0.5 * steps / steps.max(initial=1.0))


class RandomReward(StatelessReward):
    """A number drawn for each episode and length."""

    def __init__(self, seed: int = 0) -> None:
        """Make one; ``seed`` decides the numbers."""
        self._seed = seed

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score by a draw that depends on the episode alone, not on the batch."""
        keys = zip(batch.episode_id.tolist(), batch.num_steps.tolist(), strict=True)
        drawn = np.array([np.random.default_rng([self._seed, *key]).random() for key in keys])
        return _result(batch, drawn, drawn)


def _result(batch: TrajectoryBatch, progress: Floats, quality: Floats) -> RewardResult:
    return RewardResult(
        score=np.where(batch.success, 1.0, quality).astype(np.float32),
        progress=progress.astype(np.float32),
        status=tuple("success" if solved else "shaped" for solved in batch.success),
    )
