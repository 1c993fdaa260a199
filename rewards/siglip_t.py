"""SigLIP-T: progress from image features, with the temporal part that its authors never trained.

Three temporal parts are told apart. ``none``: frame features as they are. ``additive``: a random
embedding of the frame's number is added, which is what was published; added before a mean it cannot
tell one order of frames from another. ``causal``: a progress head, trained on the run's own
successes each time the reward learns, which is what was meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from verl_vla.core.errors import ConfigError
from verl_vla.rewards import (
    Floats,
    HeadConfig,
    ProgressHead,
    Reference,
    ReferenceReward,
    Rows,
    TrajectoryBatch,
    align,
    center_on_start,
)
from verl_vla.rewards.encoders import make_encoder

FREQUENCIES = 256
MAX_PERIOD = 10_000.0
"""Of the published time embedding (siglip-grpo ``temporal_embedding.py``)."""
NUM_NEIGHBOURS = 5
NO_HEAD = 0.5
"""Quality while the head has seen no success: it knows nothing, so all are the same."""

Pooling = Literal["mean", "last_k", "align"]
Temporal = Literal["none", "additive", "causal"]


class SiglipTReward(ReferenceReward):
    """Similarity to successes, or a trained head's progress, over pooled frames."""

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
        seed: int = 0,
    ) -> None:
        """Make an untrained one.

        Args:
            encoder: see `verl_vla.rewards.encoders.make_encoder`; ``policy_towers`` with
                ``tower: last`` is the published one, ``siglip`` the pretrained tower by itself.
            encoder_args: its arguments.
            temporal: ``none``, ``additive`` or ``causal``.
            pooling: what of an episode's rows counts: their ``mean``, the ``last_k``, or, without
                a head, where they ``align`` with successes.
            last_k: rows; a row is a policy step. The publication pooled 20 frames, which at 8 steps
                a policy step are 3 rows.
            alpha: what the best conceivable failure is worth, in (0, 1).
            anneal: see `ReferenceReward`.
            head_width: of the causal head.
            head_steps: its optimizer steps in one update.
            memory_capacity: successes kept of each task.
            memory_max_age: updates after which they are forgotten.
            max_invalid_share: see `ReferenceReward`.
            seed: of the random weights and of the head's training.

        Raises:
            ConfigError: an unknown word, a number outside its range, or ``align`` with a head.
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
        )
        self._temporal = temporal
        self._pooling = pooling
        self._last_k = last_k
        self._config = HeadConfig(width=head_width, steps=head_steps)
        self._seed = seed
        self._head: ProgressHead | None = None
        self._time: nn.Module | None = None

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
        centre = np.mean([self._pool(rows) for rows in successes], axis=0)
        return np.array([_cosine(self._pool(rows), centre) for rows in timed])

    def quality(self, task_key: str, measures: Floats) -> Floats:
        """Progress is a quality already; a cosine is moved to 0 to 1."""
        if self._temporal == "causal" or self._pooling == "align":
            return measures
        return (1 + measures) / 2

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Remember the successes, and train the head on all that are remembered."""
        metrics = dict(super().update(batch))
        memory = self._memory
        kept = {key: [r.features for r in memory.of_task(key)] for key in memory.tasks}
        successes = {key: rows for key, rows in kept.items() if rows}
        if self._temporal == "causal" and successes:
            if self._head is None:
                feature_size = next(iter(successes.values()))[0].shape[1]
                self._head = ProgressHead(feature_size, self._config, self._seed)
            metrics |= self._head.train(successes)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The references and the head."""
        head = None if self._head is None else self._head.state_dict()
        return {**super().state_dict(), "head": head}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state)
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
        """Rows less the first one and, if additive, plus the embedding of their numbers."""
        rows = center_on_start(features)
        if self._temporal != "additive":
            return rows
        if self._time is None:
            self._time = _time_embedding(features.shape[1], self._seed)
        with torch.no_grad():
            return rows + self._time(_sinusoids(len(rows))).numpy()


def _time_embedding(feature_size: int, seed: int) -> nn.Module:
    """The published network, untrained as it was published."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FREQUENCIES, feature_size), nn.SiLU(), nn.Linear(feature_size, feature_size)
        )


def _sinusoids(num_rows: int) -> torch.Tensor:
    """[T, FREQUENCIES], cosines then sines of the row's number."""
    half = FREQUENCIES // 2
    rates = torch.exp(-np.log(MAX_PERIOD) * torch.arange(half) / half)
    angles = torch.arange(num_rows)[:, None] * rates[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _cosine(a: Floats, b: Floats) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else 0.0
