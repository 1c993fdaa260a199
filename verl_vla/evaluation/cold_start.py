"""The cold-start check: does the policy succeed often enough for GRPO to learn from it?

GRPO compares episodes of one start. If all of them fail, nothing is learned, and a run would spend
hundreds of episodes to find that out. Therefore a short evaluation, the probe, runs before the
first update, and the run stops if the policy succeeds too rarely.

Episodes of the probe: GRPO learns from sampled actions, so a few episodes are sampled at the
training temperature, on the first *training* starts of every task, the same for every seed. The
first round of training would give the same information at no extra cost, but at full size it is 512
episodes and up to ``max_rounds`` times as many, and its starts change with the seed.

Decision: if the sampled rate reaches the threshold, training starts. If the upper end of its 95%
interval is below the threshold, the run stops. In between more episodes are played, `MAX_ROUNDS`
times as many at most, and then the rate decides. With the defaults a policy of true rate 5% passes
in 2% of all runs, one of 20% in 97%; a test simulates both.

Greedy episodes decide nothing. They tell a policy that cannot do the task from one whose
temperature is too high, for the message of a refusal: the evaluation before training is used if it
is on and greedy, otherwise the probe's first starts are rolled out greedily.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from verl_vla.config.grpo import ColdStartConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ColdStartError
from verl_vla.core.files import atomic_write, recording
from verl_vla.core.json_files import Entries, read_json
from verl_vla.core.success_rate import SuccessRate
from verl_vla.evaluation.evaluate import Evaluation, evaluate
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import Simulators

MAX_ROUNDS = 4
"""Largest number of rounds of probe episodes, each of `ColdStartConfig.episodes`."""
COLD_START_FILE = "cold_start.json"
"""Name of the file in the run's folder with the measurement and the decision."""


class Decision(Entries):
    """Content of `COLD_START_FILE`, as far as it is read again."""

    passed: bool


Split = Literal["train", "held_out", "sampled"]
WORDS: dict[Split, str] = {"train": "training", "held_out": "held-out", "sampled": "sampled"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Success counts of greedy or of sampled episodes."""

    split: Split
    """Split of the starts."""
    total: SuccessRate
    per_task: dict[int, SuccessRate]
    """Keyed by task id."""

    @classmethod
    def of(cls, result: Evaluation, split: Split) -> Rates:
        """Keep the counts of ``result`` without its images."""
        return cls(split=split, total=result.total, per_task=result.per_task)

    def plus(self, other: Rates) -> Rates:
        """Return the counts of both."""
        # a round may have covered other tasks than the one before
        tasks = sorted({*self.per_task, *other.per_task})
        none = SuccessRate(successes=0, episodes=0, crashes=0)
        both = [
            {t: rates.per_task[t] if t in rates.per_task else none for t in tasks}
            for rates in (self, other)
        ]
        return Rates(
            split=self.split,
            total=self.total.plus(other.total),
            per_task={t: both[0][t].plus(both[1][t]) for t in tasks},
        )

    def as_json(self, task_names: dict[int, str]) -> dict[str, Any]:
        """Return the counts, pooled and by task name."""
        return {
            "states": self.split,
            "total": self.total.as_json(),
            "tasks": {task_names[task]: rate.as_json() for task, rate in self.per_task.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Success rates of a policy before training."""

    sampled: Rates
    temperature: float
    """Sampling temperature of the sampled episodes."""
    greedy: Rates | None
    """None where the policy passes and no greedy evaluation was made."""

    def passes(self, threshold: float) -> bool:
        """Apply the decision rule of this module; a rate of zero episodes reaches no threshold."""
        return self.sampled.total.rate >= threshold

    def is_decided(self, threshold: float) -> bool:
        """Check whether more episodes are unnecessary."""
        _, most = self.sampled.total.ci95
        return self.passes(threshold) or most < threshold

    def require(self, threshold: float, task_names: dict[int, str]) -> None:
        """Check that the policy passes.

        Raises:
            ColdStartError: it does not; the message has the rates, pooled and by task, and the
                remedies.
        """
        if self.passes(threshold):
            return
        tasks = "; ".join(
            f"{name}: greedy {_counts(self.greedy, task)}, sampled {_counts(self.sampled, task)}"
            for task, name in task_names.items()
        )
        raise ColdStartError(
            f"the policy succeeds too seldom for GRPO to learn from: {self.summary()}; at least "
            f"{100 * threshold:g}% are wanted (cold_start.threshold). By task: {tasks}. "
            f"{self._remedy(threshold)}; cold_start.mode=off trains nevertheless"
        )

    def summary(self) -> str:
        """Return the known rates with their counts, as a part of a sentence."""
        low, high = (100 * end for end in self.sampled.total.ci95)
        sampled = (
            f"sampled at temperature {self.temperature:g} it solved "
            f"{_in_words(self.sampled.total)} {WORDS[self.sampled.split]} episodes "
            f"(95% interval {low:.1f}-{high:.1f}%)"
        )
        if self.greedy is None:
            return sampled
        greedy, split = _in_words(self.greedy.total), WORDS[self.greedy.split]
        return f"{sampled}, greedily {greedy} {split} ones"

    def as_json(self, config: ColdStartConfig, task_names: dict[int, str]) -> dict[str, Any]:
        """Return the measurement and the decision, as plain values."""
        return {
            "passed": self.passes(config.threshold),
            "threshold": config.threshold,
            "temperature": self.temperature,
            "greedy": None if self.greedy is None else self.greedy.as_json(task_names),
            "sampled": self.sampled.as_json(task_names),
        }

    def _remedy(self, threshold: float) -> str:
        if not self.sampled.total.episodes:
            return "Every simulator was lost: see the reason of each crash and repair that first"
        if self.greedy is not None and self.greedy.total.rate >= threshold:
            return "Greedy play is good enough: lower sampling.temperature, which drowns it"
        return (
            "Fine-tune the policy further on demonstrations (sft), choose easier tasks "
            "(environment.tasks), or take a dense reward, which tells failures apart: "
            "reward=reaching sampling.filter_on=reward, or your own (docs/add-a-reward.md)"
        )


def probe(
    starts: Sequence[Start],
    policy: Policy,
    simulators: Simulators,
    *,
    config: ColdStartConfig,
    temperature: float,
    seed: int,
    greedy: Rates | None,
) -> Probe:
    """Measure a policy until the decision is clear.

    Args:
        starts: training starts; `probe_starts` chooses among them.
        policy: the policy to measure.
        simulators: a pool whose slots are all free.
        config: threshold, and number of episodes in a round.
        temperature: temperature of the sampled episodes, above 0.
        seed: seed of the sampling noise.
        greedy: known greedy rates; with None, a policy that fails is also rolled out greedily.
    """

    def rates(chosen: Sequence[Start], at: float, first_episode: int = 0) -> Rates:
        result = evaluate(
            chosen,
            policy,
            simulators,
            temperature=at,
            seed=seed,
            first_episode=first_episode,
        )
        return Rates.of(result, "train")

    first = probe_starts(starts, config.episodes)
    used = {*first}
    found = Probe(sampled=rates(first, temperature), temperature=temperature, greedy=greedy)
    # the first round is made already
    for _ in range(MAX_ROUNDS - 1):
        left = [start for start in starts if start not in used]
        if not left or found.is_decided(config.threshold):
            break
        chosen = probe_starts(left, config.episodes)
        # ids of their own: two episodes of a probe never share their noise
        more = rates(chosen, temperature, first_episode=len(used))
        used |= {*chosen}
        found = replace(found, sampled=found.sampled.plus(more))
    if greedy is None and not found.passes(config.threshold):
        # only now: a policy that passes needs no greedy episodes
        return replace(found, greedy=rates(first, 0.0))
    return found


def probe_starts(starts: Sequence[Start], episodes: int) -> tuple[Start, ...]:
    """Choose the first starts of every task, round-robin over tasks, at most ``episodes``.

    If there are more tasks than episodes, evenly spaced tasks are taken.

    >>> starts = [Start(task_id=t, init_state_id=i) for t in (3, 5) for i in range(9)]
    >>> [(s.task_id, s.init_state_id) for s in probe_starts(starts, 3)]
    [(3, 0), (5, 0), (3, 1)]
    """
    by_task: dict[int, list[Start]] = {}
    for start in starts:
        by_task.setdefault(start.task_id, []).append(start)
    # in the order of the starts, so that the choice is the same each time
    tasks = list(by_task.values())
    if episodes < len(tasks):
        tasks = [tasks[i * len(tasks) // episodes] for i in range(episodes)]
    longest = max(map(len, tasks))
    in_turn = [task[lap] for lap in range(longest) for task in tasks if lap < len(task)]
    return tuple(in_turn[:episodes])


def keep(folder: Path, record: dict[str, Any]) -> None:
    """Write a probe's record into the run's folder, atomically."""
    file = folder / COLD_START_FILE
    with recording(file):
        atomic_write(file, json.dumps(record, indent=1))


def was_passed(folder: Path) -> bool:
    """Check whether the policy of this run has already passed.

    Raises:
        ConfigError: the record is damaged.
    """
    file = folder / COLD_START_FILE
    return file.exists() and read_json(file, Decision, "remove the file to check again").passed


def _counts(rates: Rates | None, task: int) -> str:
    if rates is None or task not in rates.per_task:
        return "not played"
    return _in_words(rates.per_task[task])


def _in_words(rate: SuccessRate) -> str:
    crashed = f" ({rate.crashes} crashed)" if rate.crashes else ""
    return f"{rate.successes} of {rate.episodes}{crashed}"
