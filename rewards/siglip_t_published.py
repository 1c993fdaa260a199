"""The reward that siglip-grpo published as SigLIP-T, for comparison. Do not train on it.

Sources: ``src/siglip_grpo/reward.py:71-130`` and ``temporal_embedding.py``. It differs from
`rewards/siglip_t.py` with ``temporal: additive`` in three points: features are not centred on the
start of the episode; similarities are stretched over the failures of a task, so that the worst one
always scores 0.004 and the best 0.596, whatever was seen; and without a success in the batch all
failures score 0. The time embedding is random and stays so, since the gradient to it is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.rewards import (
    AdditiveTime,
    Floats,
    Need,
    RewardResult,
    Rows,
    StatelessReward,
    TrajectoryBatch,
    cosine,
    min_max_sigmoid,
)
from verl_vla.rewards.encoders import make_encoder

Temporal = Literal["none", "additive"]


class SiglipTPublishedReward(StatelessReward):
    """A reward of min-max normalised cosine similarity to the mean success, by a sigmoid."""

    requires: frozenset[Need] = frozenset({"features"})

    def __init__(
        self,
        encoder: str,
        encoder_args: Mapping[str, Any] | None = None,
        temporal: Temporal = "additive",
        last_k: int = 3,
        seed: int = 0,
    ) -> None:
        """Make the reward.

        Args:
            encoder: see `verl_vla.rewards.encoders.make_encoder`; ``policy_towers`` with
                ``tower: last`` is the published one.
            encoder_args: arguments of the encoder.
            temporal: ``additive`` adds the random embedding of the row index, ``none`` nothing.
            last_k: number of last rows that are pooled, 0 for all. A row is a policy step; the
                publication pooled 20 frames, which at 8 steps per policy step are 3 rows.
            seed: seed of the random weights of the embedding.

        Raises:
            ConfigError: an unknown ``temporal``, or ``last_k`` below 0.
        """
        if temporal not in ("none", "additive"):
            raise ConfigError(f"temporal is {temporal!r}; choose 'none' or 'additive'")
        if last_k < 0:
            raise ConfigError(f"last_k is {last_k}; set 0 for all rows, or more")
        self.encoder = make_encoder(encoder, encoder_args or {})
        self._temporal, self._last_k = temporal, last_k
        self._add_time = AdditiveTime(seed)

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Score each episode as the publication does."""
        if batch.features is None:
            raise ContractError("SiglipTPublishedReward compares features, and the batch has none")
        pooled = [self._pool(rows) for rows in batch.features]
        similarity, score = published_scores(pooled, batch.success, batch.task_key)
        return RewardResult(
            score=score.astype(np.float32),
            progress=similarity.astype(np.float32),
            status=tuple("success" if solved else "shaped" for solved in batch.success),
        )

    def _pool(self, rows: Rows) -> Floats:
        timed = self._add_time(rows) if self._temporal == "additive" else rows
        chosen = timed[-self._last_k :] if self._last_k else timed
        return chosen.astype(np.float64).mean(axis=0)


def published_scores(
    pooled: list[Floats], success: npt.NDArray[np.bool_], task_key: tuple[str, ...]
) -> tuple[Floats, Floats]:
    """Compare the pooled features [D] of episodes with the mean success of their task.

    Returns:
        [B] cosine similarities, NaN where the task has no success; [B] scores.
    """
    similarity = np.full(len(pooled), np.nan)
    score = success.astype(np.float64)
    for key in sorted(set(task_key)):
        member = np.array([k == key for k in task_key])
        failed = np.flatnonzero(member & ~success)
        # as published: without a success in the batch, failures stay at 0
        if not (member & success).any() or not len(failed):
            continue
        centre = np.mean([pooled[row] for row in np.flatnonzero(member & success)], axis=0)
        # successes are compared too, for the progress that is shown; their score stays 1
        similarity[member] = [cosine(pooled[row], centre) for row in np.flatnonzero(member)]
        score[failed] = min_max_sigmoid(similarity[failed])
    return similarity, score
