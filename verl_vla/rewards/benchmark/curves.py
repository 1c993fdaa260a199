"""Progress along an episode, and a cache of the features that it is computed from."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import cast

import numpy as np

from verl_vla.rewards import (
    Floats,
    Rows,
    TrajectoryBatch,
    TrajectoryReward,
    VideoNeed,
    complete,
    judge,
    video_need,
)
from verl_vla.rewards.base import HasEncoder
from verl_vla.rewards.benchmark.samples import Indices, Sample, join, prefix_lengths, take
from verl_vla.rewards.encoders.base import ImageEncoder

TRAIN, TEST = "train", "test"
"""Names of the two splits of the episodes in a `FeatureShelf`."""


class FeatureShelf:
    """A cache of features per part of the episodes.

    It is shared by the rewards of one feature space that encode the same images.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, VideoNeed | None, str], tuple[tuple[Rows, ...], float]] = {}

    def fill(
        self, reward: TrajectoryReward, part: str, batch: TrajectoryBatch
    ) -> tuple[TrajectoryBatch, float]:
        """Return the batch as `complete` does, and the seconds that its encoding took at first."""
        if "features" not in reward.requires:
            return complete(reward, batch), 0.0
        space = cast("HasEncoder", reward).encoder.feature_space
        key = (space, video_need(reward), part)
        if key not in self._made:
            began = time.perf_counter()
            features = complete(reward, batch).features
            assert features is not None
            self._made[key] = features, time.perf_counter() - began
        features, seconds = self._made[key]
        # features are there now, so this only leaves out what the reward does not require
        return complete(reward, replace(batch, features=features, feature_space=space)), seconds


def follow(
    reward: TrajectoryReward,
    shelf: FeatureShelf,
    train: Sample,
    test: Sample,
    *,
    num_groups: int,
    num_points: int,
) -> tuple[Floats, ...]:
    """Measure progress along the episodes of the first test groups, as if each had ended there.

    The outcome is hidden from the reward. References are the successes that it learned from.

    Args:
        reward: a reward that has learned from ``train``.
        shelf: cache of the features of both splits.
        train: the train split.
        test: the test split.
        num_groups: number of test groups that are measured.
        num_points: policy steps of an episode at which progress is measured, at most.

    Returns:
        For the first episodes of ``test``, progress at their `prefix_lengths`.
    """
    groups = np.unique(test.batch.group_id)[:num_groups]
    followed = np.flatnonzero(np.isin(test.batch.group_id, groups))
    if not len(followed):
        return ()
    assert followed[-1] == len(followed) - 1, "groups stand in the order of their ids"
    sample = test.take(followed)
    solved = np.flatnonzero(train.batch.success)
    references = take(shelf.fill(reward, TRAIN, train.batch)[0], solved)
    lengths = [prefix_lengths(len(e), num_points) for e in sample.executed]
    values: list[list[float]] = [[] for _ in lengths]
    for point in range(max(map(len, lengths))):
        # an episode with fewer points waits at its end; it is not counted below
        cut_at = np.array([ends[min(point, len(ends) - 1)] for ends in lengths])
        batch = _encode_cut(reward, shelf, test, sample, cut_at, point)
        # the cut episodes have no success among them, so a reward without a memory needs these
        progress = judge(reward, join(batch, references)).progress[: len(batch)]
        for row, ends in enumerate(lengths):
            if point < len(ends):
                values[row].append(float(progress[row]))
    return tuple(np.array(curve) for curve in values)


def _encode_cut(
    reward: TrajectoryReward,
    shelf: FeatureShelf,
    test: Sample,
    sample: Sample,
    cut_at: Indices,
    point: int,
) -> TrajectoryBatch:
    """Call `complete` on the first policy steps of episodes.

    The features of an `ImageEncoder` do not depend on later images, so those of the complete
    episode are cut: they have one row an image. An encoder of clips must encode the shorter episode
    again.
    """
    batch = sample.cut(cut_at).batch
    if "features" not in reward.requires:
        return complete(reward, batch)
    encoder = cast("HasEncoder", reward).encoder
    if not isinstance(encoder, ImageEncoder):
        # a cut episode is a part of its own: another clip has other features
        return shelf.fill(reward, f"point {point}", batch)[0]
    whole = shelf.fill(reward, TEST, test.batch)[0].features
    assert whole is not None
    shown = batch.frames if sample.need is None else batch.videos
    assert shown is not None
    # not strict: `whole` has later groups too
    features = tuple(rows[: len(images)] for rows, images in zip(whole, shown, strict=False))
    space = encoder.feature_space
    return complete(reward, replace(batch, features=features, feature_space=space))
