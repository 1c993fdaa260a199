"""Rewards measured before anyone trains on them: do they rank failures as the simulator does?

GRPO compares the episodes of a group. Where some succeed, the outcome ranks successes above
failures for free; all that a shaped reward adds is an order *among failures*. So that is measured,
on real failures of a policy, with controls that know nothing and one that knows everything.
"""

from verl_vla.rewards.benchmark.bench import BenchConfig, BenchRow, measure
from verl_vla.rewards.benchmark.entries import make_entries, read_rewards
from verl_vla.rewards.benchmark.episodes import (
    PlayConfig,
    choose_groups,
    claim,
    is_complete,
    play_missing,
    played_with,
    read_rounds,
)
from verl_vla.rewards.benchmark.plots import draw_features, draw_progress, draw_reliability
from verl_vla.rewards.benchmark.samples import Sample, halve, make_sample
from verl_vla.rewards.benchmark.table import (
    describe,
    paper_table,
    ranking_table,
    table_as_json,
    verdicts,
)
from verl_vla.rewards.benchmark.verdict import VERDICT_RULE

__all__ = [
    "VERDICT_RULE",
    "BenchConfig",
    "BenchRow",
    "PlayConfig",
    "Sample",
    "table_as_json",
    "choose_groups",
    "claim",
    "describe",
    "draw_features",
    "draw_progress",
    "draw_reliability",
    "halve",
    "is_complete",
    "make_entries",
    "make_sample",
    "measure",
    "paper_table",
    "play_missing",
    "played_with",
    "ranking_table",
    "read_rewards",
    "read_rounds",
    "verdicts",
]
