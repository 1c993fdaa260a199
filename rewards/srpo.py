"""SRPO (arXiv:2511.15605): a failure scores higher the closer it is to a cluster of successes.

The formula is the paper's, with corrections of its release: every episode has separate features,
the scale of clustering is such that clusters are found, and the z-score has the sign that rewards
*near* failures (equation 5 as printed would reward far ones). Mean and spread of the distances come
from earlier steps once there are enough, so that no failure changes the score of another.

Beyond the paper:

- clips have the length of their episode, up to the encoder's ``max_frames``, instead of 64 frames
  each; a longer one is thinned evenly in time (`Vjepa2Encoder`);
- features are relative to the episode's first row (``from_start``);
- by default the encoder sees what the policy saw, prepared for it, one image a policy step, instead
  of the camera's image at every step (``video_every=1``);
- failures of a group that differ by less than successes do score ``alpha / 2`` (``noise_gate``);
- successes of earlier steps are references too (``memory_capacity``).

Groups without a success reach training only with ``sampling.filter_on=reward``. The default drops
them, and so does the release, before it scores them (siiRL
``user_interface/filter_interface/embodied.py:113``: success rates from 0.1 to 0.9 are kept).
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
    is_valid,
    optional_video,
)
from verl_vla.rewards.encoders import make_encoder

MIN_SAMPLES = 2
"""Least number of successes in a cluster; the release's value."""
SCALE = 1.5
"""Radius of DBSCAN, in medians of the distance to the nearest success. The release standardises
every feature and uses 0.5: in 1408 dimensions successes are then 50 to 75 apart, and no cluster
is ever found."""
ENOUGH_DISTANCES = 8
"""Number of earlier failures of a task from which mean and spread are computed without the current
ones; the size of a group."""
VIDEO_FRAMES = 64
"""Frames of an episode's video (paper; the length of clips that V-JEPA 2 was trained on)."""
KEPT_DISTANCES = 256
"""Number of distances kept of each task, those of the newest failures."""


class SrpoReward(ReferenceReward):
    """A reward of ``alpha * sigmoid(-z)``, where z is the z-score of a failure's distance.

    The distance is to the nearest cluster centre of the task's successes.
    """

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
        noise_gate: bool = True,
        video_every: int = 0,
    ) -> None:
        """Make a reward without references.

        Args:
            encoder: see `verl_vla.rewards.encoders.make_encoder`; the paper's is ``vjepa2``.
            encoder_args: arguments of the encoder.
            alpha: score of the best possible failure; 0.8 was best in the paper.
            anneal: see `ReferenceReward`.
            from_start: subtract an episode's first row, so that layouts can be pooled. The paper
                does not.
            memory_capacity: successes kept of each task.
            memory_max_age: updates after which they are removed.
            max_invalid_share: see `ReferenceReward`.
            noise_gate: see `ReferenceReward`.
            video_every: simulator steps between two frames of the video that is encoded; 1 as in
                the paper, and `verl_vla.envs.base.EnvConfig` says what it costs. 0 encodes the
                images of policy steps.

        Raises:
            ConfigError: a number outside its range.
        """
        video = optional_video(video_every, max_frames=VIDEO_FRAMES)
        super().__init__(
            make_encoder(encoder, encoder_args or {}),
            alpha=alpha,
            anneal=anneal,
            memory_capacity=memory_capacity,
            memory_max_age=memory_max_age,
            max_invalid_share=max_invalid_share,
            noise_gate=noise_gate,
        )
        if video is not None:
            self.requires = frozenset({"features", "video"})
            self.video = video
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
        # too few earlier ones say little, so the current failures are counted with them
        known = earlier if len(earlier) >= ENOUGH_DISTANCES else [*earlier, *-measures]
        spread = float(np.std(known))
        # one distance, or equal ones, have no spread to define what is far
        z = (-measures - np.mean(known)) / spread if spread > 0 else np.zeros(len(measures))
        # sigmoid(-z); clipped, or exp overflows for a distance far beyond the spread
        return 1 / (1 + np.exp(np.clip(z, -50, 50)))

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Keep the distances of the failures, as they were scored, and the successes."""
        features = batch.features or ()
        fresh: dict[str, list[tuple[int, float]]] = {}
        for row in np.flatnonzero(~batch.success):
            key = batch.task_key[row]
            references = self._memory.select(batch, key, int(batch.init_state_id[row])).items
            if references and is_valid(features[row]):
                distance = -float(self.measure(key, [features[row]], references)[0])
                fresh.setdefault(key, []).append((int(batch.episode_id[row]), distance))
        # only now: the failures were scored with the memory as it was before
        metrics = super().update(batch)
        for key, pairs in fresh.items():
            kept = self._distances.setdefault(key, [])
            # by episode id, so that the order in which episodes ended changes nothing
            kept.extend(distance for _, distance in sorted(pairs))
            del kept[:-KEPT_DISTANCES]
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the references and the distances of earlier failures."""
        distances = {key: list(kept) for key, kept in self._distances.items()}
        return {**super().state_dict(), "distances": distances}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._distances = {key: list(kept) for key, kept in state["distances"].items()}

    def _embed(self, features: Rows) -> Floats:
        rows = center_on_start(features) if self._from_start else features
        return rows.astype(np.float64).mean(axis=0)


def cluster_centres(embeddings: Floats) -> Floats:
    """Compute the centres of DBSCAN's clusters; an outlier is a cluster of one.

    Args:
        embeddings: [R, D], one or more.

    Returns:
        [C, D]. Outliers are kept because an unusual success is a way to succeed too.
    """
    num = len(embeddings)
    # of two successes, each is the other's nearest: they are one cluster at any scale
    if num < MIN_SAMPLES + 1:
        return embeddings.mean(axis=0, keepdims=True)
    distance = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
    # without itself, at distance 0
    nearest = np.where(np.eye(num, dtype=bool), np.inf, distance).min(axis=1)
    # where most are duplicates the radius is 0, which scikit-learn rejects
    radius = max(SCALE * float(np.median(nearest)), float(np.finfo(np.float64).tiny))
    # precomputed: the distances are there already
    _, labels = dbscan(distance, eps=radius, min_samples=MIN_SAMPLES, metric="precomputed")
    members = [labels == label for label in range(labels.max() + 1)]
    alone = [np.arange(num) == i for i in np.flatnonzero(labels < 0)]
    return np.stack([embeddings[chosen].mean(axis=0) for chosen in (*members, *alone)])
