"""Statistics of rewards. A number that cannot be computed is NaN, never 0.

Ranks are compared within a task and averaged over tasks: a reward may have a different scale in
each task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from verl_vla.rewards import Floats

Indices = npt.NDArray[np.int64]

MIN_RANKED = 3
"""Least number of episodes for a rank correlation: for two it is always 1 or -1."""
PAIR_GAP = 0.1
"""Difference in true progress that a pair of failures must exceed to be counted."""
NEAR_MISS, FAR_MISS = 0.7, 0.3
"""True progress from which a failure is a near miss, and up to which it is a far miss."""
MIN_GROUPS = 5
"""Least number of groups for a bootstrap interval: fewer do not show how groups vary."""
MIN_DEFINED = 0.5
"""Share of the resamples that must have a value; below it there is no interval."""
LEVEL = (2.5, 97.5)
"""Percentiles of a 95% interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval and count."""

    value: float
    low: float
    high: float
    """Ends of the bootstrap interval, 95%."""
    count: int
    """Number of items that the value was computed from; the caller of `estimate` defines them."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values; NaN becomes null."""
        ends = [number(self.low), number(self.high)]
        return {"value": number(self.value), "ci95": ends, "count": self.count}


def number(value: float) -> float | None:
    """Return None for NaN or infinity, since JSON has neither."""
    return float(value) if math.isfinite(value) else None


def estimate(
    statistic: Callable[[Indices], float],
    group: Indices,
    *,
    seed: int,
    resamples: int,
    count: int | None = None,
) -> Estimate:
    """Compute a number and its interval by resampling groups (Efron 1979, percentile method).

    Episodes of a group share a start and are not independent, so complete groups are resampled.

    Args:
        statistic: maps row indices to a number; a row may occur several times.
        group: [n], group of each row.
        seed: seed of the resampling.
        resamples: number of resamples; 1000 give an end of the interval to about a tenth of its
            width.
        count: count to report; the number of rows by default.
    """
    value = statistic(np.arange(len(group)))
    known = np.unique(group)
    num = len(group) if count is None else count
    # value and count stand for themselves: only the interval needs enough groups
    if math.isnan(value) or len(known) < MIN_GROUPS:
        return Estimate(value, math.nan, math.nan, num)
    members = [np.flatnonzero(group == g) for g in known]
    rng = np.random.default_rng(seed)
    # with replacement, [resamples, groups]
    drawn = rng.integers(len(known), size=(resamples, len(known)))
    values = np.array([statistic(np.concatenate([members[i] for i in row])) for row in drawn])
    # a resample may hold no pair at all, or one outcome only
    defined = values[~np.isnan(values)]
    if len(defined) < MIN_DEFINED * resamples:
        return Estimate(value, math.nan, math.nan, num)
    low, high = np.percentile(defined, LEVEL)
    return Estimate(value, float(low), float(high), num)


def spearman(a: Floats, b: Floats) -> float:
    """Return the rank correlation, mean ranks for ties; NaN if one is constant or n is below 3.

    >>> spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3]))
    1.0
    """
    if len(a) < MIN_RANKED:
        return math.nan
    return pearson(rankdata(a), rankdata(b))


def pearson(a: Floats, b: Floats) -> float:
    """Return the correlation; NaN where one is constant or there are fewer than two values."""
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return math.nan
    x, y = a - a.mean(), b - b.mean()
    # rounding can take it past 1
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1, 1))


def auroc(positive: Floats, negative: Floats) -> float:
    """Return the share of pairs in which the positive is above the negative; a tie counts half.

    NaN without positives or without negatives.

    >>> auroc(np.array([0.8, 0.5]), np.array([0.5, 0.1]))
    0.875
    """
    if not len(positive) or not len(negative):
        return math.nan
    ranks = rankdata(np.concatenate([positive, negative]))
    num = len(positive)
    # Mann and Whitney's U: the rank sum less the least that it can be
    above = ranks[:num].sum() - num * (num + 1) / 2
    return float(above / (num * len(negative)))


def mean_over(labels: Indices, statistic: Callable[[Indices], float]) -> float:
    """Return the mean of a statistic over the classes in which it is known; NaN if in none.

    Args:
        labels: [n], the class of each row.
        statistic: maps the row indices of one class to a number.
    """
    values = [statistic(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


@dataclass(frozen=True, slots=True)
class Ranking:
    """Agreement of the progress or score of failures with their true progress."""

    spearman: Estimate
    """Rank correlation with true progress, mean over tasks; its count is of failures."""
    pair_accuracy: Estimate
    """Share of pairs within a group in the right order, ties by half; its count is of pairs."""
    near_miss_auroc: Estimate
    """AUROC of near misses against far misses, mean over tasks; its count is of both."""

    def as_json(self) -> dict[str, Any]:
        """Return all three, by name."""
        return {
            "spearman": self.spearman.as_json(),
            "pair_accuracy": self.pair_accuracy.as_json(),
            "near_miss_auroc": self.near_miss_auroc.as_json(),
        }


def rank_failures(
    reading: Floats,
    truth: Floats,
    *,
    task: Indices,
    group: Indices,
    seed: int,
    resamples: int,
) -> Ranking:
    """Compare the progress or score of failures with their true progress.

    Args:
        reading: [n], progress or score; a failure with NaN is left out.
        truth: [n], true progress, 0 to 1.
        task: [n]
        group: [n]
        seed: seed of the intervals.
        resamples: see `estimate`.
    """

    def interval(
        statistic: Callable[[Indices], float], of: Indices, count: int | None = None
    ) -> Estimate:
        return estimate(statistic, of, seed=seed, resamples=resamples, count=count)

    known = ~np.isnan(reading)
    reading, truth, task, group = reading[known], truth[known], task[known], group[known]

    def correlation(rows: Indices) -> float:
        return mean_over(task[rows], lambda i: spearman(reading[rows[i]], truth[rows[i]]))

    def near_against_far_miss(rows: Indices) -> float:
        def of_task(i: Indices) -> float:
            value, true = reading[rows[i]], truth[rows[i]]
            return auroc(value[true >= NEAR_MISS], value[true <= FAR_MISS])

        return mean_over(task[rows], of_task)

    better, worse = _pairs(truth, group)
    # [pairs]: 1 in the right order, 1/2 for a tie
    right = (reading[better] > reading[worse]) + 0.5 * (reading[better] == reading[worse])
    extreme = np.flatnonzero((truth >= NEAR_MISS) | (truth <= FAR_MISS))
    return Ranking(
        spearman=interval(correlation, group),
        # a pair is resampled with the group that both of its failures are in
        pair_accuracy=interval(
            lambda rows: float(right[rows].mean()) if len(rows) else math.nan, group[better]
        ),
        near_miss_auroc=interval(near_against_far_miss, group, len(extreme)),
    )


def _pairs(truth: Floats, group: Indices) -> tuple[Indices, Indices]:
    """Return pairs of rows of one group by true progress: the better rows and the worse ones."""
    gap = truth[:, None] - truth[None, :]
    better, worse = np.nonzero((gap > PAIR_GAP) & (group[:, None] == group[None, :]))
    return better, worse
