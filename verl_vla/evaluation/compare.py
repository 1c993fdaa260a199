"""Paired comparison of two policies on the same starts.

Since the starts are the same, only those on which the policies disagree carry information (McNemar
1947): if the policies were equally good, either outcome of such a start would be equally likely.
The exact test is valid for small numbers too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import read_json
from verl_vla.core.success_rate import SuccessRate
from verl_vla.core.text import TextTable, differences
from verl_vla.evaluation.conditions import DECIDES
from verl_vla.runs.run_dir import EVALUATE_AGAIN, require_evaluation_record

TOLD = ("image_size", "seed", "dtype", "device", "versions")
"""Conditions that may differ between two evaluations that are compared; they are named."""

RESULT = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Outcomes of two policies on the same starts, without starts where either crashed."""

    both: int
    """Starts that both solved."""
    first_only: int
    second_only: int
    neither: int

    @property
    def pairs(self) -> int:
        """Number of starts that count."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def rates(self) -> tuple[SuccessRate, SuccessRate]:
        """Success rates of the first and of the second policy, over the pairs."""
        solved = (self.both + self.first_only, self.both + self.second_only)
        first, second = (
            SuccessRate(successes=number, episodes=self.pairs, crashes=0) for number in solved
        )
        return first, second

    @property
    def p_value(self) -> float:
        """Two-sided exact p-value: probability of such a split or a more uneven one by chance.

        >>> Paired(both=0, first_only=1, second_only=9, neither=0).p_value
        0.021484375
        """
        disagreements = self.first_only + self.second_only
        if not disagreements:
            # no disagreement at all, which chance explains in full
            return 1.0
        return float(binomtest(self.first_only, disagreements, 0.5).pvalue)


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read an evaluation of `eval` or of a training run; of a folder, its ``evaluation.json``.

    Raises:
        ConfigError: there is no such evaluation, or it lacks its conditions.
    """
    file = path / RESULT if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing; name the folder of a finished eval, or a file of a run's "
            "evaluations/ (an evaluation that was cut short ends when the same eval is run again)"
        )
    record = read_json(file, dict[str, Any], EVALUATE_AGAIN)
    missing = [key for key in (*DECIDES, "episodes", "tasks") if key not in record]
    if missing:
        raise ConfigError(
            f"{file} does not say its {', '.join(missing)}; it was written by an older version: "
            "evaluate the policy again"
        )
    return require_evaluation_record(record, file)


def pair(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Paired]:
    """Compare two evaluations, by task name, with ``all tasks`` as the last entry.

    Raises:
        ConfigError: they differ in one of the conditions `DECIDES`, or in their starts.
    """
    # only what decides: a difference elsewhere is told and allowed
    here, there = ({key: record[key] for key in DECIDES} for record in (first, second))
    differ = differences(here, there)
    if differ:
        raise ConfigError(
            f"these evaluations do not compare: {'; '.join(differ)}. Evaluate one of them again "
            "under the conditions of the other"
        )
    one, other = ({_start(e): e["outcome"] for e in r["episodes"]} for r in (first, second))
    # the same keys in any order: outcomes are looked up by start
    if one.keys() != other.keys():
        raise ConfigError(
            f"these evaluations do not compare: {len(one.keys() - other.keys())} starts were "
            f"played by the first alone and {len(other.keys() - one.keys())} by the second alone; "
            "ask for the same --tasks and --episodes-per-task"
        )
    names = dict(zip(sorted({task for task, _ in one}), _names_in_order(first), strict=True))
    tasks = {name: [start for start in one if start[0] == task] for task, name in names.items()}
    return {
        name: count_pairs([(one[start], other[start]) for start in starts])
        for name, starts in (tasks | {"all tasks": list(one)}).items()
    }


def told_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """List differences in the conditions `TOLD`, as ``key: first -> second``."""
    here, there = ({key: r[key] for key in TOLD if key in r} for r in (first, second))
    return differences(here, there)


def table(pairs: Mapping[str, Paired]) -> TextTable:
    """Format rates with 95% Wilson intervals, disagreements, and p-values of McNemar's test."""
    rows = [
        [name, *map(_cell, found.rates), str(found.first_only), str(found.second_only)]
        + [f"{found.p_value:7.4f}"]
        for name, found in pairs.items()
    ]
    return TextTable(["", "A", "B", "A only", "B only", "p"], rows)


def as_json(pairs: Mapping[str, Paired]) -> dict[str, Any]:
    """Return the comparison as plain values."""
    return {
        name: {
            "first": found.rates[0].as_json(),
            "second": found.rates[1].as_json(),
            "both": found.both,
            "first_only": found.first_only,
            "second_only": found.second_only,
            "neither": found.neither,
            "p_value": found.p_value,
        }
        for name, found in pairs.items()
    }


def _start(episode: Mapping[str, Any]) -> tuple[int, int]:
    return episode["task"], episode["init_state"]


def _names_in_order(record: Mapping[str, Any]) -> list[str]:
    """Return task names by rising task id; ``tasks`` is in the order of the command line."""
    ids = list(dict.fromkeys(episode["task"] for episode in record["episodes"]))
    return [name for _, name in sorted(zip(ids, record["tasks"], strict=True))]


def count_pairs(outcomes: Sequence[tuple[int, int]]) -> Paired:
    """Count the pairs of `Outcome` in which neither is a crash."""
    judged = [
        (first == Outcome.SUCCESS, second == Outcome.SUCCESS)
        for first, second in outcomes
        if Outcome.CRASH not in (first, second)
    ]
    return Paired(
        both=judged.count((True, True)),
        first_only=judged.count((True, False)),
        second_only=judged.count((False, True)),
        neither=judged.count((False, False)),
    )


def _cell(rate: SuccessRate) -> str:
    low, high = (100 * end for end in rate.ci95)
    counts = f"{rate.successes}/{rate.episodes}"
    return f"{100 * rate.rate:5.1f}% {counts:>7} [{low:3.0f},{high:3.0f}]"
