"""The cold-start check: does the policy succeed often enough for GRPO to have something to compare?

GRPO compares episodes of one start. Where all of them fail nothing is learned, and a run that
finds this out by itself plays hundreds of episodes for it. So before the first update the policy
is probed, and the run stops where it succeeds too seldom.

What is played. GRPO learns from sampled play, so a few episodes are sampled at the training
temperature, on the first *training* starts of every task, the same for every seed. The first
round of training would tell the same at no extra cost, but at full size it is 512 episodes and
up to ``max_rounds`` times as many, and its starts change with the seed. Greedy play tells a cold
policy from one that the temperature drowns; the evaluation before training is such play, with
more episodes, and is used where it is on and greedy. Else the probe's starts are played greedily.

What decides. The sampled rate: at the threshold or above, training starts. Below it, the probe is
small, so a policy whose greedy rate reaches the threshold is let through unless the whole 95%
interval of its sampled rate lies below (with 32 episodes: unless it solved none).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from verl_vla.config.grpo import ColdStartConfig, EvaluationConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ColdStartError
from verl_vla.core.files import atomic_write
from verl_vla.core.success_rate import SuccessRate
from verl_vla.evaluation.evaluate import Evaluation, evaluate
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import Simulators

COLD_START_FILE = "cold_start.json"
"""What was measured and decided, in the run's folder."""

Split = Literal["train", "held_out", "sampled"]
WORDS: dict[Split, str] = {"train": "training", "held_out": "held-out", "sampled": "sampled"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The counts of one way to play."""

    split: Split
    """Whether the starts were those to train on or those held out."""
    total: SuccessRate
    per_task: dict[int, SuccessRate]
    """Keyed by task id."""

    @classmethod
    def of(cls, result: Evaluation, split: Split) -> Rates:
        """Keep the counts of ``result`` and let its images go."""
        return cls(split=split, total=result.total, per_task=result.per_task)

    def as_json(self, task_names: dict[int, str]) -> dict[str, Any]:
        """The counts, pooled and by the names of the tasks."""
        return {
            "states": self.split,
            "total": self.total.as_json(),
            "tasks": {task_names[task]: rate.as_json() for task, rate in self.per_task.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a policy can do before it is trained."""

    greedy: Rates
    sampled: Rates
    temperature: float
    """Of the sampled half."""

    def passes(self, threshold: float) -> bool:
        """Apply the rule of this module; a rate of no episodes at all reaches no threshold."""
        if self.sampled.total.rate >= threshold:
            return True
        _, most = self.sampled.total.ci95
        return self.greedy.total.rate >= threshold and most >= threshold

    def require(self, threshold: float, task_names: dict[int, str]) -> None:
        """Stop a run that has nothing to learn from.

        Raises:
            ColdStartError: says what was measured, in all and by task, and what to do.
        """
        if self.passes(threshold):
            return
        tasks = "; ".join(
            f"{name}: greedy {_counts(self.greedy.per_task.get(task))}, "
            f"sampled {_counts(self.sampled.per_task.get(task))}"
            for task, name in task_names.items()
        )
        raise ColdStartError(
            f"the policy succeeds too seldom for GRPO to learn from: {self.summary()}; at least "
            f"{100 * threshold:g}% are wanted (cold_start.threshold). By task: {tasks}. "
            f"{self._remedy(threshold)}; cold_start.mode=off trains nevertheless"
        )

    def summary(self) -> str:
        """Both rates with their counts, as a part of a sentence."""
        low, high = (100 * end for end in self.sampled.total.ci95)
        return (
            f"sampled at temperature {self.temperature:g} it solved "
            f"{_counts(self.sampled.total)} {WORDS[self.sampled.split]} episodes "
            f"(95% interval {low:.1f}-{high:.1f}%), greedily {_counts(self.greedy.total)} "
            f"{WORDS[self.greedy.split]} ones"
        )

    def as_json(self, config: ColdStartConfig, task_names: dict[int, str]) -> dict[str, Any]:
        """What was measured and what follows from it."""
        return {
            "passed": self.passes(config.threshold),
            "threshold": config.threshold,
            "temperature": self.temperature,
            "greedy": self.greedy.as_json(task_names),
            "sampled": self.sampled.as_json(task_names),
        }

    def _remedy(self, threshold: float) -> str:
        if not self.sampled.total.episodes:
            return "Every simulator was lost: see the reason of each crash and repair that first"
        if self.greedy.total.rate >= threshold:
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
    temperature: float,
    seed: int,
    greedy: Rates | None,
) -> Probe:
    """Measure a policy.

    Args:
        starts: what is played, see `probe_starts`.
        policy: what is judged.
        simulators: a pool whose slots are all free.
        temperature: of the sampled half, above 0.
        seed: of the noise.
        greedy: what greedy play is known to bring; None plays ``starts`` greedily.
    """

    def rates(at: float) -> Rates:
        config = EvaluationConfig(temperature=at)
        return Rates.of(evaluate(starts, policy, simulators, config=config, seed=seed), "train")

    sampled = rates(temperature)
    return Probe(
        greedy=rates(0.0) if greedy is None else greedy, sampled=sampled, temperature=temperature
    )


def probe_starts(starts: Sequence[Start], episodes: int) -> tuple[Start, ...]:
    """Choose the first starts of every task in turn, at most ``episodes``.

    Where there are more tasks than episodes, tasks at even distances are taken.

    >>> starts = [Start(task_id=t, init_state_id=i) for t in (3, 5) for i in range(9)]
    >>> [(s.task_id, s.init_state_id) for s in probe_starts(starts, 3)]
    [(3, 0), (5, 0), (3, 1)]
    """
    by_task: dict[int, list[Start]] = {}
    for start in starts:
        by_task.setdefault(start.task_id, []).append(start)
    tasks = list(by_task.values())
    if episodes < len(tasks):
        tasks = [tasks[i * len(tasks) // episodes] for i in range(episodes)]
    longest = max(map(len, tasks))
    in_turn = [task[lap] for lap in range(longest) for task in tasks if lap < len(task)]
    return tuple(in_turn[:episodes])


def keep(folder: Path, record: dict[str, Any]) -> None:
    """Write a probe's record into the run's folder, whole or not at all."""
    atomic_write(folder / COLD_START_FILE, json.dumps(record, indent=1))


def was_passed(folder: Path) -> bool:
    """Whether the policy of this run has already passed."""
    file = folder / COLD_START_FILE
    return file.exists() and bool(json.loads(file.read_text())["passed"])


def _counts(rate: SuccessRate | None) -> str:
    if rate is None:
        return "not played"
    crashed = f" ({rate.crashes} crashed)" if rate.crashes else ""
    return f"{rate.successes} of {rate.episodes}{crashed}"
