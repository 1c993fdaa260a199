"""SRPO (arXiv:2511.15605): a failure is worth more the closer it came to a cluster of successes.

The formula is the paper's, with what its release left out: every episode has features of its own,
clustering has a scale at which it fires, and the z-score enters with the sign that rewards *near*
failures (printed as it is, equation 5 would reward far ones). Mean and spread of the distances are
taken from earlier steps once there are enough, so that no failure moves the score of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.cluster import dbscan

from verl_vla.rewards import (
    Floats,
    Reference,
    ReferenceReward,
    Rows,
    TrajectoryBatch,
    center_on_start,
    is_sound,
)
from verl_vla.rewards.encoders import make_encoder

MIN_SAMPLES = 2
"""Successes that make a cluster; the release's value."""
SCALE = 1.5
"""DBSCAN's radius, in medians of the distance to the nearest success. The release standardises
every feature and takes 0.5: in 1408 dimensions successes are then 50 to 75 apart, and no cluster
is ever found."""
ENOUGH_DISTANCES = 8
"""Earlier failures of a task from which mean and spread are taken alone; a group's worth."""
KEPT_DISTANCES = 256
"""Of the newest failures of each task."""


class SrpoReward(ReferenceReward):
    """``alpha * sigmoid(-z)`` of the distance to the nearest centre of the task's successes."""

    def __init__(
        self,
        encoder: str,
        encoder_args: Mapping[str, Any] | None = None,
        alpha: float = 0.8,
        anneal: bool = False,
        from_start: bool = True,
        memory_capacity: int = 64,
        memory_max_age: int = 100,
        max_invalid_share: float = 0.05,
    ) -> None:
        """Make one without references.

        Args:
            encoder: see `verl_vla.rewards.encoders.make_encoder`; the paper's is ``vjepa2``.
            encoder_args: its arguments.
            alpha: what the best conceivable failure is worth; 0.8 was best in the paper.
            anneal: see `ReferenceReward`.
            from_start: subtract an episode's first row, so that layouts can be pooled. The paper
                does not.
            memory_capacity: successes kept of each task.
            memory_max_age: updates after which they are forgotten.
            max_invalid_share: see `ReferenceReward`.

        Raises:
            ConfigError: a number outside its range.
        """
        super().__init__(
            make_encoder(encoder, encoder_args or {}),
            alpha=alpha,
            anneal=anneal,
            memory_capacity=memory_capacity,
            memory_max_age=memory_max_age,
            max_invalid_share=max_invalid_share,
        )
        self._from_start = from_start
        self._distances: dict[str, list[float]] = {}

    def measure(
        self, task_key: str, episodes: Sequence[Rows], references: Sequence[Reference]
    ) -> Floats:
        """Return [n], minus the distance to the nearest centre."""
        centres = cluster_centres(np.stack([self._embed(r.features) for r in references]))
        asked = np.stack([self._embed(rows) for rows in episodes])
        return -np.linalg.norm(asked[:, None] - centres[None], axis=2).min(axis=1)

    def quality(self, task_key: str, measures: Floats) -> Floats:
        """Return [n], sigmoid(-z) of the distances."""
        earlier = self._distances[task_key] if task_key in self._distances else []
        known = earlier if len(earlier) >= ENOUGH_DISTANCES else [*earlier, *-measures]
        spread = float(np.std(known))
        # one distance, or equal ones, say nothing of what is far
        z = (-measures - np.mean(known)) / spread if spread > 0 else np.zeros(len(measures))
        return 1 / (1 + np.exp(np.clip(z, -50, 50)))

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Remember the distances of the failures, as they were scored, and the successes."""
        features = batch.features or ()
        fresh: dict[str, list[tuple[int, float]]] = {}
        for row in np.flatnonzero(~batch.success):
            key = batch.task_key[row]
            references = self._memory.select(batch, key, int(batch.init_state_id[row])).items
            if references and is_sound(features[row]):
                distance = -float(self.measure(key, [features[row]], references)[0])
                fresh.setdefault(key, []).append((int(batch.episode_id[row]), distance))
        metrics = super().update(batch)
        for key, pairs in fresh.items():
            kept = self._distances.setdefault(key, [])
            kept.extend(distance for _, distance in sorted(pairs))
            del kept[:-KEPT_DISTANCES]
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The references and the distances of earlier failures."""
        distances = {key: list(kept) for key, kept in self._distances.items()}
        return {**super().state_dict(), "distances": distances}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state)
        self._distances = {key: list(kept) for key, kept in state["distances"].items()}

    def _embed(self, features: Rows) -> Floats:
        rows = center_on_start(features) if self._from_start else features
        return rows.astype(np.float64).mean(axis=0)


def cluster_centres(embeddings: Floats) -> Floats:
    """Centres of DBSCAN's clusters; what belongs to none is a centre of its own.

    Args:
        embeddings: [R, D], one or more.

    Returns:
        [C, D]. A success that stands alone is still a way to succeed, so it is not dropped.
    """
    num = len(embeddings)
    if num < MIN_SAMPLES + 1:
        return embeddings.mean(axis=0, keepdims=True)
    distance = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
    nearest = np.where(np.eye(num, dtype=bool), np.inf, distance).min(axis=1)
    # where most are duplicates the radius is 0, which scikit-learn refuses
    radius = max(SCALE * float(np.median(nearest)), float(np.finfo(np.float64).tiny))
    _, labels = dbscan(distance, eps=radius, min_samples=MIN_SAMPLES, metric="precomputed")
    members = [labels == label for label in range(labels.max() + 1)]
    alone = [np.arange(num) == i for i in np.flatnonzero(labels < 0)]
    return np.stack([embeddings[chosen].mean(axis=0) for chosen in (*members, *alone)])
