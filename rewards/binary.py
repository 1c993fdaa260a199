"""1 for a solved task, 0 otherwise: the reward every other one is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from verl_vla.reward import Need, RewardResult, TrajectoryBatch


class BinaryReward:
    """Reads the simulator's own success flag; has no parameters and no state."""

    requires: frozenset[Need] = frozenset()

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode by its outcome alone."""
        return RewardResult(
            score=batch.success.astype(np.float32),
            progress=batch.success.astype(np.float32),
            status=tuple("success" if solved else "failure" for solved in batch.success),
        )

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Nothing is learned."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is restored."""
