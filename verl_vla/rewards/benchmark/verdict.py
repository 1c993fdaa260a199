"""The rule by which a reward passes, fixed before any episode is played."""

from __future__ import annotations

import math
from dataclasses import dataclass

from verl_vla.rewards.benchmark.statistics import Estimate

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
    bar = 0.0 if math.isnan(clock.value) else clock.high
    return Verdict(spearman.low > 0, None if math.isnan(bar) else spearman.low > bar)
