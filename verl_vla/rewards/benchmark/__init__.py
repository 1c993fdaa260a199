"""Benchmark of rewards without training: do they rank failures as the simulator does?

GRPO compares the episodes of a group. If some succeed, the outcome already ranks successes above
failures; a shaped reward only adds an order *among failures*. The benchmark measures this order on
real failures of a policy. Controls give the scale: a clock and random scores, which see nothing of
the episode, and an oracle, which reads the simulator's state.
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
    require_groups,
)
from verl_vla.rewards.benchmark.plots import draw_features, draw_progress, draw_reliability
from verl_vla.rewards.benchmark.samples import Sample, halve, make_sample
from verl_vla.rewards.benchmark.table import (
    VERDICT_RULE,
    describe,
    paper_table,
    ranking_table,
    table_as_json,
    verdicts,
)
from verl_vla.rewards.benchmark.videos import film_missing, folder_name, video_needs

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
    "film_missing",
    "folder_name",
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
    "require_groups",
    "verdicts",
    "video_needs",
]
