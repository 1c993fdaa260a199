"""A measurement as a table for the console and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from verl_vla.core.text import TextTable
from verl_vla.rewards.benchmark.bench import BenchRow
from verl_vla.rewards.benchmark.entries import CLOCK
from verl_vla.rewards.benchmark.samples import Sample
from verl_vla.rewards.benchmark.statistics import FAR_MISS, NEAR_MISS, Estimate, number

VERDICT_RULE = {
    "reading": "progress, of failures on starts that the reward never learned from",
    "ranks_failures": "lower end of the 95% interval of Spearman among failures > 0",
    "beats_the_clock": "that lower end lies above the upper end of the clock's interval; where the "
    "clock is the same for all failures and so has no correlation, above 0",
    "undecided": "null, where the reward has no interval",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of the rule; None where it cannot decide."""

    ranks_failures: bool | None
    beats_the_clock: bool | None


def decide(spearman: Estimate, clock: Estimate) -> Verdict:
    """Apply `VERDICT_RULE`."""
    if math.isnan(spearman.low):
        return Verdict(None, None)
    # a clock that says nothing sets no bar
    bar = 0.0 if math.isnan(clock.value) else clock.high
    return Verdict(spearman.low > 0, None if math.isnan(bar) else spearman.low > bar)


UNKNOWN = "-"
WORDS = {True: "yes", False: "no", None: UNKNOWN}


def verdicts(rows: Sequence[BenchRow]) -> dict[str, Verdict]:
    """Apply the rule to every row, by label."""
    clock = next(row for row in rows if row.label == CLOCK).by_progress.spearman
    return {row.label: decide(row.by_progress.spearman, clock) for row in rows}


def table_as_json(rows: Sequence[BenchRow], found: Mapping[str, Verdict]) -> dict[str, Any]:
    """Return every row by its label, with its verdict."""
    return {row.label: row.as_json() | {"verdict": asdict(found[row.label])} for row in rows}


def describe(test: Sample) -> dict[str, Any]:
    """Describe the test sample: without failures that differ, no number is meaningful."""
    truth = test.truth[~test.batch.success]
    return {
        "groups": len(np.unique(test.batch.group_id)),
        "successes": int(test.batch.success.sum()),
        "failures": len(truth),
        "near_misses": int((truth >= NEAR_MISS).sum()),
        "far_misses": int((truth <= FAR_MISS).sum()),
        "true_progress_quartiles": [
            number(q) for q in (np.percentile(truth, (0, 25, 50, 75, 100)) if len(truth) else ())
        ],
    }


def ranking_table(rows: Sequence[BenchRow], found: Mapping[str, Verdict]) -> TextTable:
    """Return the table of rankings and verdicts."""
    head = [
        "reward",
        "Spearman (95%)",
        "of score",
        "pairs (95%)",
        "near/far miss",
        "changes A",
        "largest",
        "ms/episode",
        "bytes",
        "ranks",
        "> clock",
    ]
    lines = [
        [
            row.label,
            _interval(row.by_progress.spearman),
            _plain(row.by_score.spearman.value),
            _interval(row.by_progress.pair_accuracy),
            _plain(row.by_progress.near_miss_auroc.value),
            _share(row.changes_advantage.value),
            _plain(row.largest_change),
            _plain(1000 * row.seconds, digits=1),
            _plain(row.feature_bytes, digits=0),
            WORDS[found[row.label].ranks_failures],
            WORDS[found[row.label].beats_the_clock],
        ]
        for row in rows
    ]
    return TextTable(head, lines)


def paper_table(rows: Sequence[BenchRow]) -> TextTable:
    """Return the paper's five numbers, for rewards with progress along episodes."""
    head = ["reward", "SC", "Mono", "MMD2", "JS", "SMD"]
    lines = [
        [
            row.label,
            *(_plain(value, digits=3) for value in (p.sc, p.mono, p.mmd2, p.js, p.smd)),
        ]
        for row in rows
        if (p := row.paper) is not None
    ]
    return TextTable(head, lines)


def _interval(found: Estimate) -> str:
    if math.isnan(found.low):
        return _plain(found.value)
    return f"{found.value:+.2f} ({found.low:+.2f}, {found.high:+.2f})"


def _plain(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else UNKNOWN


def _share(value: float) -> str:
    return f"{100 * value:.0f}%" if math.isfinite(value) else UNKNOWN
