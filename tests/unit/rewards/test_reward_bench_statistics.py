"""Each number of the reward benchmark, against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, spearmanr

from verl_vla.rewards.benchmark.paper import (
    index_correlation,
    jensen_shannon,
    mmd2,
    paper_numbers,
    rising_share,
    standardised_difference,
)
from verl_vla.rewards.benchmark.statistics import (
    MIN_GROUPS,
    Estimate,
    auroc,
    estimate,
    mean_over,
    number,
    pearson,
    rank_failures,
    spearman,
)
from verl_vla.rewards.benchmark.table import decide

NAN = math.nan


def rank(reading, truth, *, task=None, group=None):
    num = len(reading)
    return rank_failures(
        np.array(reading, dtype=float),
        np.array(truth, dtype=float),
        task=np.zeros(num, dtype=int) if task is None else np.array(task),
        group=np.arange(num) if group is None else np.array(group),
        seed=0,
        resamples=300,
    )


def test_spearman_is_scipys_ties_included():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 40).astype(float)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b"),
    [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [4.0] * 3), ([1.0, 2.0], [1.0, 2.0])],
    ids=["constant reading", "constant truth", "two episodes"],
)
def test_what_cannot_be_ranked_is_unknown_and_not_zero(a, b):
    assert math.isnan(spearman(np.array(a), np.array(b)))


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 9, 12).astype(float), rng.integers(0, 7, 20).astype(float)
    expected = mannwhitneyu(a, b).statistic / (12 * 20)
    assert auroc(a, b) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(auroc(a, np.zeros(0)))


def test_a_mean_over_classes_leaves_out_what_is_unknown():
    values = {0: 0.5, 1: NAN, 2: 1.0}
    labels = np.array([0, 1, 1, 2])
    assert mean_over(labels, lambda rows: values[int(labels[rows[0]])]) == 0.75
    assert math.isnan(mean_over(labels, lambda rows: NAN))


def test_spearman_is_the_mean_over_tasks_whatever_their_units():
    truth = [0.1, 0.5, 0.9, 0.1, 0.5, 0.9]
    found = rank([1, 2, 3, 900, 800, 850], truth, task=[0, 0, 0, 1, 1, 1]).spearman
    assert found.value == pytest.approx((1 - 0.5) / 2)
    assert found.count == 6


def test_pairs_are_of_one_group_and_differ_in_truth():
    # of the first group: .5/.1 right, .55/.1 tied; .55/.5 is too near to ask. Across groups: none.
    found = rank([1, 2, 1, 9, 0], [0.1, 0.5, 0.55, 0.0, 1.0], group=[0, 0, 0, 1, 2]).pair_accuracy
    assert (found.value, found.count) == (0.75, 2)


def test_near_misses_are_compared_with_far_misses_of_their_task():
    reading, truth = [5, 1, 3, 0.2, 0.1, 9], [0.7, 0.3, 0.5, 0.8, 0.1, 0.9]
    found = rank(reading, truth, task=[0, 0, 0, 1, 1, 2]).near_miss_auroc
    assert (found.value, found.count) == (1.0, 5)


def test_a_failure_that_the_reward_does_not_know_is_left_out():
    found = rank([1, NAN, 2, 3], [0.0, 1.0, 0.2, 0.4]).spearman
    assert (found.value, found.count) == (pytest.approx(1.0), 3)


def test_without_failures_nothing_is_known_and_the_counts_say_so():
    found = rank([], [])
    for part in (found.spearman, found.pair_accuracy, found.near_miss_auroc):
        assert math.isnan(part.value) and math.isnan(part.low) and part.count == 0
    assert found.as_json()["spearman"] == {"value": None, "ci95": [None, None], "count": 0}


def test_groups_are_drawn_whole_and_the_seed_decides():
    group = np.repeat(np.arange(6), 4)
    values = np.repeat([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 4)

    def drawn(rows):
        assert all(count % 4 == 0 for count in np.bincount(group[rows]))
        return float(values[rows].mean())

    first, again, other = (estimate(drawn, group, seed=s, resamples=1000) for s in (0, 0, 1))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high) or first.value == other.value
    # the mean of six fair coins: 1/6 or less in 11% of the draws, 0 in 1.6%
    assert first.value == 0.5 and first.low in (0.0, pytest.approx(1 / 6))


def test_few_groups_have_no_interval():
    few = estimate(lambda rows: 1.0, np.arange(MIN_GROUPS - 1), seed=0, resamples=9)
    assert few.value == 1.0 and math.isnan(few.low) and math.isnan(few.high)
    enough = estimate(lambda rows: 1.0, np.arange(MIN_GROUPS), seed=0, resamples=9)
    assert (enough.low, enough.high) == (1.0, 1.0)


def test_an_interval_needs_resamples_that_have_a_value():
    everyone = estimate(
        lambda rows: 1.0 if len(set(rows)) == 9 else NAN, np.arange(9), seed=0, resamples=99
    )
    assert everyone.value == 1.0 and math.isnan(everyone.low)


def test_random_readings_have_intervals_that_hold_nothing():
    """As often as 95% intervals should: of ten, at most two miss (which 99% of all tens keep)."""
    held = np.zeros(2)
    group = np.repeat(np.arange(20), 5)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth = rng.random(100)
        found = rank(rng.random(100), truth, group=group)
        held += [
            found.spearman.low < 0 < found.spearman.high,
            found.pair_accuracy.low < 0.5 < found.pair_accuracy.high,
        ]
    assert (held >= 8).all(), held


def test_the_truth_ranks_failures_perfectly():
    truth, group = np.random.default_rng(0).random(60), np.repeat(np.arange(12), 5)
    exact = rank(truth, truth, group=group)
    for part in (exact.spearman, exact.pair_accuracy, exact.near_miss_auroc):
        assert part.value == part.low == pytest.approx(1.0)


def test_the_verdict_asks_for_the_lower_end():
    nowhere = Estimate(NAN, NAN, NAN, 9)
    good, weak = Estimate(0.5, 0.3, 0.7, 9), Estimate(0.2, -0.1, 0.5, 9)
    assert decide(good, nowhere).ranks_failures is True
    assert decide(good, nowhere).beats_the_clock is True
    assert decide(weak, nowhere).ranks_failures is False
    assert decide(weak, nowhere).beats_the_clock is False
    assert decide(good, Estimate(0.2, 0.1, 0.4, 9)).beats_the_clock is False
    assert decide(good, Estimate(0.1, 0.0, 0.2, 9)).beats_the_clock is True
    assert decide(Estimate(0.5, NAN, NAN, 9), nowhere).ranks_failures is None
    assert decide(good, Estimate(0.1, NAN, NAN, 9)).beats_the_clock is None


def test_a_clock_has_perfect_sc_and_mono():
    clock = np.arange(1.0, 6.0)
    assert index_correlation(clock) == pytest.approx(1.0)
    assert rising_share(clock) == 1.0
    assert index_correlation(np.array([0.0, 2.0, 1.0])) == pytest.approx(0.5)
    assert rising_share(np.array([0.0, 2.0, 1.0])) == 0.5
    assert math.isnan(rising_share(np.array([1.0])))
    assert math.isnan(index_correlation(np.array([1.0, NAN])))


def test_the_distances_between_successes_and_failures_by_hand():
    a, b = np.array([1.0, 3.0]), np.array([0.0, 2.0])
    assert standardised_difference(a, b) == pytest.approx(1 / math.sqrt(2))
    assert jensen_shannon(np.array([0.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(math.log(2))
    assert jensen_shannon(a, a) == pytest.approx(0.0)
    # one distance, 1, so the kernel across is exp(-1/2)
    apart = mmd2(np.array([0.0, 0.0]), np.array([1.0, 1.0]))
    assert apart == pytest.approx(2 - 2 * math.exp(-0.5))
    same = np.ones(2)
    assert math.isnan(mmd2(same, same))
    assert math.isnan(jensen_shannon(same, same))
    assert math.isnan(standardised_difference(same, same))


def test_the_papers_numbers_are_means_over_tasks_of_what_is_known():
    success = np.array([True, True, False, False, True, False])
    task = np.array([0, 0, 0, 0, 1, 1])
    curves = [np.array(c) for c in ([0, 1, 3], [0, 2, 2], [0, 0], [0, 2], [1, 0], [0.0])]
    found = paper_numbers([c.astype(float) for c in curves], success, task)
    assert found.mono == pytest.approx(((1 + 0.5) / 2 + 0) / 2)
    # the second task has one of each, which have no spread
    assert found.smd == standardised_difference(np.array([3.0, 2.0]), np.array([0.0, 2.0]))
    assert (found.num_successes, found.num_failures) == (3, 3)
    assert found.as_json()["num_failures"] == 3
    nothing = paper_numbers([np.array([NAN])], np.array([False]), np.array([0]))
    assert nothing.as_json()["sc"] is None and nothing.as_json()["smd"] is None


def test_an_unknown_number_is_null_in_json():
    assert number(NAN) is None and number(math.inf) is None and number(0.0) == 0.0
