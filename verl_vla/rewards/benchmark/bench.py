"""Measurement of rewards: they learn from the train half of the starts, and score the test half."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field, StrictInt

from verl_vla.config.choices import MOST_SEED
from verl_vla.config.schema import section
from verl_vla.rewards import (
    Floats,
    RewardResult,
    StatelessReward,
    TrajectoryBatch,
    TrajectoryReward,
    VideoNeed,
    judge,
    learn,
    looks_at_images,
    video_need,
)
from verl_vla.rewards.benchmark.curves import TEST, TRAIN, FeatureShelf, follow
from verl_vla.rewards.benchmark.entries import Entry
from verl_vla.rewards.benchmark.paper import PaperNumbers, paper_numbers
from verl_vla.rewards.benchmark.samples import Sample, take
from verl_vla.rewards.benchmark.statistics import Estimate, Ranking, estimate, number, rank_failures
from verl_vla.rl.advantage import group_advantage

SAME_ADVANTAGE = 1e-4
"""Difference up to which advantages count as the same: GRPO adds 1e-6 to a standard deviation,
which moves an advantage by about that much when rewards are scaled."""
SHUFFLED = ", shuffled"
"""Suffix of the label of a reward that saw the frames of failures out of order."""
_SHUFFLED_PART = "shuffled"


@section("")
class BenchConfig:
    """Settings of the measurement."""

    seed: StrictInt = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of the rewards, of the frame shuffling and of the bootstrap intervals."""
    groups_per_update: StrictInt = Field(default=8, ge=1)
    """Groups that a reward learns from in one update, as in a training step."""
    curve_groups: StrictInt = Field(default=16, ge=0)
    """Test groups whose progress is measured along the episode; 0 for none. Rewards that encode
    frames themselves take most of their time here."""
    curve_points: StrictInt = Field(default=8, ge=2)
    """Policy steps of an episode at which progress is measured."""
    resamples: StrictInt = Field(default=1000, ge=1)
    """Bootstrap resamples of the groups, for the intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Progress, scores and features that a reward gave for the test episodes."""

    progress: Floats
    """[B]"""
    score: Floats
    """[B]"""
    curves: tuple[Floats, ...]
    """Progress along each of the first episodes, at `prefix_lengths`, with the outcome hidden."""
    end_features: Floats | None
    """[B, D], the last row of each episode; None without an encoder."""
    feature_space: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One line of the table."""

    label: str
    is_control: bool
    by_progress: Ranking
    by_score: Ranking
    changes_advantage: Estimate
    """Share of groups whose advantages differ from those of the outcome; its count is of groups."""
    largest_change: float
    """Largest difference of an advantage from that of the outcome."""
    paper: PaperNumbers | None
    statuses: dict[str, int]
    seconds: float
    """Time to encode and score one episode."""
    feature_bytes: float
    """Size of the features of one episode; NaN if the batch holds none for this reward."""
    readings: Readings

    def as_json(self) -> dict[str, Any]:
        """Return every field except the readings, as plain values."""
        return {
            "is_control": self.is_control,
            "by_progress": self.by_progress.as_json(),
            "by_score": self.by_score.as_json(),
            "changes_advantage": self.changes_advantage.as_json(),
            "largest_change": number(self.largest_change),
            "paper": None if self.paper is None else self.paper.as_json(),
            "statuses": self.statuses,
            "seconds_per_episode": self.seconds,
            "feature_bytes_per_episode": number(self.feature_bytes),
        }


def measure(
    entries: Sequence[Entry],
    halves: Mapping[VideoNeed | None, tuple[Sample, Sample]],
    config: BenchConfig,
) -> list[BenchRow]:
    """Let every reward learn, then measure it; a reward that requires images has a second row.

    The second row is a control: the frames of failures are shuffled.

    Args:
        entries: new rewards; learning changes them.
        halves: the same episodes, with the videos of each reward that requires some, and under
            None without; the first half is what they may learn from, the second has other starts,
            split ``held_out``.
        config: settings of the measurement.

    Returns:
        The rows, in the order of the entries.
    """
    # rewards of one feature space share what was encoded
    shelf = FeatureShelf()
    rows: list[BenchRow] = []
    for entry in entries:
        reward = entry.reward
        train, test = halves[video_need(reward)]
        _let_learn(reward, shelf.fill(reward, TRAIN, train.batch)[0], config)
        curves = follow(
            reward,
            shelf,
            train,
            test,
            num_groups=config.curve_groups,
            num_points=config.curve_points,
        )
        rows.append(_row(entry, entry.label, shelf, TEST, test, curves, config))
        if looks_at_images(reward) or test.need is not None:
            label = entry.label + SHUFFLED
            shuffled = test.shuffle_failures(config.seed)
            row = _row(entry, label, shelf, _SHUFFLED_PART, shuffled, (), config)
            rows.append(replace(row, is_control=True))
    return rows


def _let_learn(reward: TrajectoryReward, batch: TrajectoryBatch, config: BenchConfig) -> None:
    """Let a reward learn as in training: some groups at a time, in the order of their ids."""
    # nothing to learn, and scoring takes time
    if isinstance(reward, StatelessReward):
        return
    groups = np.unique(batch.group_id)
    for first in range(0, len(groups), config.groups_per_update):
        chosen = groups[first : first + config.groups_per_update]
        step = take(batch, np.flatnonzero(np.isin(batch.group_id, chosen)))
        # scored first, as in a training step
        judge(reward, step)
        learn(reward, step)


def _row(
    entry: Entry,
    label: str,
    shelf: FeatureShelf,
    part: str,
    sample: Sample,
    curves: tuple[Floats, ...],
    config: BenchConfig,
) -> BenchRow:
    batch, encoding_s = shelf.fill(entry.reward, part, sample.batch)
    began = time.perf_counter()
    result = judge(entry.reward, batch)
    seconds = encoding_s + time.perf_counter() - began
    task = np.unique(batch.task_key, return_inverse=True)[1]
    # successes score the same by definition, so only failures can be ranked
    failed = np.flatnonzero(~batch.success)
    progress, score = result.progress.astype(np.float64), result.score.astype(np.float64)
    by_progress, by_score = (
        rank_failures(
            reading[failed],
            sample.truth[failed],
            task=task[failed],
            group=batch.group_id[failed],
            seed=config.seed,
            resamples=config.resamples,
        )
        for reading in (progress, score)
    )
    changes = advantage_changes(batch, result)
    features = batch.features
    return BenchRow(
        label=label,
        is_control=entry.is_control,
        by_progress=by_progress,
        by_score=by_score,
        changes_advantage=estimate(
            lambda rows: float((changes[rows] > SAME_ADVANTAGE).mean()),
            np.arange(len(changes)),
            seed=config.seed,
            resamples=config.resamples,
        ),
        largest_change=float(changes.max()),
        paper=paper_numbers(curves, batch.success[: len(curves)], task[: len(curves)])
        if curves
        else None,
        statuses=dict(sorted(Counter(result.status).items())),
        seconds=seconds / len(batch),
        feature_bytes=math.nan
        if features is None
        else float(np.mean([rows.nbytes for rows in features])),
        readings=Readings(
            progress=progress,
            score=score,
            curves=curves,
            end_features=None
            if features is None
            else np.stack([rows[-1] for rows in features]).astype(np.float64),
            feature_space=batch.feature_space,
        ),
    )


def advantage_changes(batch: TrajectoryBatch, result: RewardResult) -> Floats:
    """Return [groups], the largest difference in each group of an advantage from the outcome's."""
    group = torch.from_numpy(batch.group_id)
    outcome = group_advantage(torch.from_numpy(batch.success.astype(np.float32)), group)
    shaped = group_advantage(torch.from_numpy(result.score), group)
    difference = (shaped - outcome).abs().double().numpy()
    return np.array([difference[batch.group_id == g].max() for g in np.unique(batch.group_id)])
