"""SigLIP-T: progress from image features, with the temporal part that its authors never trained.

There are three temporal parts. ``none``: frame features without change. ``additive``: the published
one, which adds a random embedding of the frame index; since it is added before a mean, it cannot
distinguish orders of frames. ``causal``: the intended one, a progress head that is trained on the
run's successes at each update.

The scores are ours in all three: features are centred on the start, and the quality of a failure is
(1 + cosine) / 2, an absolute number. The published scores are `rewards/siglip_t_published.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from verl_vla.core.errors import ConfigError
from verl_vla.rewards import (
    AdditiveTime,
    Floats,
    HeadConfig,
    ProgressHead,
    Reference,
    ReferenceReward,
    Rows,
    TrajectoryBatch,
    align,
    center_on_start,
    cosine,
)
from verl_vla.rewards.encoders import make_encoder

# as the default of `rewards/knn_align.py`
NUM_NEIGHBOURS = 5
HELD_OUT_EVERY = 4
"""Of the successes, those whose episode id divides by 4 never train the head: how much it varies on
them is the noise of its progress."""
NO_HEAD = 0.5
"""Quality of all failures before the head was trained on a success."""

Pooling = Literal["mean", "last_k", "align"]
Temporal = Literal["none", "additive", "causal"]


class SiglipTReward(ReferenceReward):
    """A reward of pooled frames: their similarity to successes, or a trained head's progress."""

    def __init__(
        self,
        encoder: str,
        encoder_args: Mapping[str, Any] | None = None,
        temporal: Temporal = "causal",
        pooling: Pooling = "last_k",
        last_k: int = 3,
        alpha: float = 0.6,
        anneal: bool = False,
        head_width: int = 64,
        head_steps: int = 50,
        memory_capacity: int = 64,
        memory_max_age: int = 100,
        max_invalid_share: float = 0.05,
        noise_gate: bool = True,
        seed: int = 0,
    ) -> None:
        """Make an untrained reward.

        Args:
            encoder: see `verl_vla.rewards.encoders.make_encoder`; ``policy_towers`` with
                ``tower: last`` is the published one, ``siglip`` the pretrained tower only.
            encoder_args: arguments of the encoder.
            temporal: ``none``, ``additive`` or ``causal``.
            pooling: pooling of an episode's rows: ``mean`` of all, mean of the ``last_k``, or,
                without a head, the mean of the ``last_k`` after `align` with successes.
            last_k: number of rows; a row is a policy step. The publication pooled 20 frames, which
                at 8 steps per policy step are 3 rows.
            alpha: score of the best possible failure, in (0, 1).
            anneal: see `ReferenceReward`.
            head_width: hidden size of the causal head.
            head_steps: optimizer steps of the head in one update.
            memory_capacity: successes kept of each task.
            memory_max_age: updates after which they are removed.
            max_invalid_share: see `ReferenceReward`.
            noise_gate: see `ReferenceReward`.
            seed: seed of the random weights and of the head's training.

        Raises:
            ConfigError: an unknown option, a number outside its range, or ``align`` with a head.
        """
        if temporal not in ("none", "additive", "causal"):
            raise ConfigError(f"temporal is {temporal!r}; choose 'none', 'additive' or 'causal'")
        if pooling not in ("mean", "last_k", "align"):
            raise ConfigError(f"pooling is {pooling!r}; choose 'mean', 'last_k' or 'align'")
        if temporal == "causal" and pooling == "align":
            raise ConfigError("a causal head has a progress of its own; pool it by mean or last_k")
        for name, value in (
            ("last_k", last_k),
            ("head_width", head_width),
            ("head_steps", head_steps),
        ):
            if value < 1:
                raise ConfigError(f"{name} is {value}; set at least 1")
        super().__init__(
            make_encoder(encoder, encoder_args or {}),
            alpha=alpha,
            anneal=anneal,
            memory_capacity=memory_capacity,
            memory_max_age=memory_max_age,
            max_invalid_share=max_invalid_share,
            noise_gate=noise_gate,
        )
        self._temporal = temporal
        self._pooling = pooling
        self._last_k = last_k
        self._config = HeadConfig(width=head_width, steps=head_steps)
        self._seed = seed
        self._head: ProgressHead | None = None
        self._add_time = AdditiveTime(seed)

    def measure(
        self, task_key: str, episodes: Sequence[Rows], references: Sequence[Reference]
    ) -> Floats:
        """Return [n]: progress 0 to 1, or cosine similarity -1 to 1."""
        if self._temporal == "causal":
            return np.array([self._head_progress(rows) for rows in episodes])
        successes = [self._timed(r.features) for r in references]
        timed = [self._timed(rows) for rows in episodes]
        if self._pooling == "align":
            return np.array(
                [align(rows, successes, NUM_NEIGHBOURS)[-self._last_k :].mean() for rows in timed]
            )
        # pooled before they are averaged, so that a long success counts no more than a short one
        centre = np.mean([self._pool(rows) for rows in successes], axis=0)
        return np.array([cosine(self._pool(rows), centre) for rows in timed])

    def quality(self, task_key: str, measures: Floats) -> Floats:
        """Return progress without change; map a cosine from -1 to 1 onto 0 to 1."""
        if self._temporal == "causal" or self._pooling == "align":
            return measures
        return (1 + measures) / 2

    def unseen(self, items: Sequence[Reference]) -> list[int]:
        """Return the indices of the references that did not train the head."""
        if self._temporal != "causal":
            return super().unseen(items)
        return [i for i, item in enumerate(items) if item.episode_id % HELD_OUT_EVERY == 0]

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Add the successes to the memory, and train the head on three in four of them."""
        metrics = dict(super().update(batch))
        memory = self._memory
        # after super().update, so that the batch's own successes train the head too
        kept = {
            key: [r.features for r in memory.of_task(key) if r.episode_id % HELD_OUT_EVERY]
            for key in memory.tasks
        }
        successes = {key: rows for key, rows in kept.items() if rows}
        if self._temporal == "causal" and successes:
            # only now is the size of the features known
            if self._head is None:
                feature_size = next(iter(successes.values()))[0].shape[1]
                self._head = ProgressHead(feature_size, self._config, self._seed)
            metrics |= self._head.train(successes)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the references and the head."""
        head = None if self._head is None else self._head.state_dict()
        return {**super().state_dict(), "head": head}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        # a state from before the first success has no head; an existing one must not survive it
        self._head = None
        if state["head"] is not None:
            self._head = ProgressHead(state["head"]["feature_size"], self._config, self._seed)
            self._head.load_state_dict(state["head"])

    def _head_progress(self, rows: Rows) -> float:
        if self._head is None:
            return NO_HEAD
        progress = self._head.progress(rows)
        return float(
            progress.mean() if self._pooling == "mean" else progress[-self._last_k :].mean()
        )

    def _pool(self, rows: Rows) -> Floats:
        chosen = rows if self._pooling == "mean" else rows[-self._last_k :]
        return chosen.astype(np.float64).mean(axis=0)

    def _timed(self, features: Rows) -> Rows:
        """Subtract the first row and, if additive, add the embedding of the row indices."""
        rows = center_on_start(features)
        return self._add_time(rows) if self._temporal == "additive" else rows
