"""The five numbers with which SRPO (arXiv:2511.15605) compares rewards, reported for reference.

They do not show what a reward adds to the outcome. A clock has perfect SC and Mono, since both use
successes only, and an outcome classifier has the best MMD, JS and SMD, since these separate
successes from failures. The paper does not state its kernel and bins, so values are comparable
within this project only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from verl_vla.rewards import Floats
from verl_vla.rewards.benchmark.statistics import Indices, mean_over, number, pearson

JS_BINS = 20
"""Number of equal bins over the range of both classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperNumbers:
    """The five numbers, each the mean over tasks of its value per task."""

    sc: float
    """Correlation of progress with the frame's index, mean over successes."""
    mono: float
    """Share of the steps on which progress rises, mean over successes."""
    mmd2: float
    """Squared maximum mean discrepancy of final progress, successes against failures."""
    js: float
    """Jensen-Shannon divergence of the same, nats, at most ln 2."""
    smd: float
    """Standardised mean difference of the same, in pooled standard deviations."""
    num_successes: int
    num_failures: int

    def as_json(self) -> dict[str, float | int | None]:
        """Return the numbers by name; null where unknown."""
        return {name: number(value) for name, value in asdict(self).items()}


def paper_numbers(
    curves: Sequence[Floats], success: npt.NDArray[np.bool_], task: Indices
) -> PaperNumbers:
    """Compute the five numbers.

    Args:
        curves: B arrays of progress along an episode, ragged; the last value is the final one.
            They must have been computed without the outcome.
        success: [B]
        task: [B]
    """
    solved = np.flatnonzero(success)
    final = np.array([curve[-1] for curve in curves])

    def along(measure: Callable[[Floats], float]) -> float:
        def of_task(rows: Indices) -> float:
            values = np.array([measure(curves[i]) for i in solved[rows].tolist()])
            known = values[~np.isnan(values)]
            return float(known.mean()) if len(known) else math.nan

        return mean_over(task[solved], of_task)

    def between(measure: Callable[[Floats, Floats], float]) -> float:
        def of_task(rows: Indices) -> float:
            # a reward may not know how far an episode came
            known = rows[~np.isnan(final[rows])]
            good, bad = final[known[success[known]]], final[known[~success[known]]]
            # a spread needs two of each
            return measure(good, bad) if min(len(good), len(bad)) > 1 else math.nan

        return mean_over(task, of_task)

    return PaperNumbers(
        sc=along(index_correlation),
        mono=along(rising_share),
        mmd2=between(mmd2),
        js=between(jensen_shannon),
        smd=between(standardised_difference),
        num_successes=len(solved),
        num_failures=len(success) - len(solved),
    )


def index_correlation(curve: Floats) -> float:
    """Return the Pearson correlation with the index; NaN for a constant or unknown curve."""
    return (
        math.nan
        if np.isnan(curve).any()
        else pearson(curve, np.arange(len(curve), dtype=np.float64))
    )


def rising_share(curve: Floats) -> float:
    """Return the share of the steps that rise; NaN for a curve of one point or an unknown one.

    >>> rising_share(np.array([0.0, 0.5, 0.5, 1.0]))
    0.666...
    """
    if len(curve) < 2 or np.isnan(curve).any():
        return math.nan
    return float((np.diff(curve) > 0).mean())


def mmd2(a: Floats, b: Floats) -> float:
    """Return the squared MMD with a Gaussian kernel (Gretton et al. 2012, biased estimate).

    The bandwidth is the median distance of all pairs; NaN where all values are the same.
    """
    both = np.concatenate([a, b])
    distance = np.abs(both[:, None] - both[None, :])
    apart = distance[np.triu_indices(len(both), 1)]
    # equal values say nothing about the scale, and many of them would make it 0
    bandwidth = float(np.median(apart[apart > 0])) if (apart > 0).any() else math.nan
    kernel = np.exp(-np.square(distance / bandwidth) / 2)
    n = len(a)
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())


def jensen_shannon(a: Floats, b: Floats) -> float:
    """Return the Jensen-Shannon divergence of two histograms in nats.

    It is 0 for equal ones, ln 2 for disjoint ones, and NaN where all values are the same.
    """
    both = np.concatenate([a, b])
    if not np.ptp(both):
        return math.nan
    edges = np.histogram_bin_edges(both, JS_BINS)
    p, q = (np.histogram(x, edges)[0] / len(x) for x in (a, b))
    # the entropy of the mean less the mean of the entropies
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


def standardised_difference(a: Floats, b: Floats) -> float:
    """Return the difference of means in pooled standard deviations (Cohen's d), or NaN."""
    degrees = len(a) + len(b) - 2
    squares = float(np.square(a - a.mean()).sum() + np.square(b - b.mean()).sum())
    return float(a.mean() - b.mean()) / math.sqrt(squares / degrees) if squares else math.nan


def _entropy(p: Floats) -> float:
    # 0 log 0 is 0
    kept = p[p > 0]
    return float(-(kept * np.log(kept)).sum())
