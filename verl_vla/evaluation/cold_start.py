"""The cold-start check: does the policy succeed often enough for GRPO to learn from it?

GRPO compares episodes of one start. If all of them fail, nothing is learned, and a run would spend
hundreds of episodes to find that out. Therefore a short evaluation, the probe, runs before the
first update, and the run stops if the policy succeeds too rarely.

Episodes of the probe: GRPO learns from sampled actions, so a few episodes are sampled at the
training temperature, on the first *training* starts of every task, the same for every seed. The
first round of training would give the same information at no extra cost, but at full size it is 512
episodes and up to ``max_rounds`` times as many, and its starts change with the seed. Greedy
episodes separate a policy that cannot do the task from one whose temperature is too high. The
evaluation before training has more episodes and is used for this if it is on and greedy; otherwise
the probe's starts are also rolled out greedily.

Decision: if the sampled rate reaches the threshold, training starts. Below it, the probe is small,
so a policy whose greedy rate reaches the threshold passes too, unless the upper end of the 95%
interval of its sampled rate is below the threshold (with 32 episodes: unless it solved none).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from verl_vla.config.grpo import ColdStartConfig
from verl_vla.config.shared import EvaluationConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ColdStartError
from verl_vla.core.files import atomic_write
from verl_vla.core.success_rate import SuccessRate
from verl_vla.evaluation.evaluate import Evaluation, evaluate
from verl_vla.policies.base import Policy
from verl_vla.rl.rollout import Simulators

COLD_START_FILE = "cold_start.json"
"""Name of the file in the run's folder with the measurement and the decision."""

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

    greedy: Rates
    sampled: Rates
    temperature: float
    """Sampling temperature of the sampled episodes."""

    def passes(self, threshold: float) -> bool:
        """Apply the decision rule of this module; a rate of zero episodes reaches no threshold."""
        if self.sampled.total.rate >= threshold:
            return True
        # a small probe can miss the threshold by chance; its interval says whether it did
        _, most = self.sampled.total.ci95
        return self.greedy.total.rate >= threshold and most >= threshold

    def require(self, threshold: float, task_names: dict[int, str]) -> None:
        """Check that the policy passes.

        Raises:
            ColdStartError: it does not; the message has the rates, pooled and by task, and the
                remedies.
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
        """Return both rates with their counts, as a part of a sentence."""
        low, high = (100 * end for end in self.sampled.total.ci95)
        return (
            f"sampled at temperature {self.temperature:g} it solved "
            f"{_counts(self.sampled.total)} {WORDS[self.sampled.split]} episodes "
            f"(95% interval {low:.1f}-{high:.1f}%), greedily {_counts(self.greedy.total)} "
            f"{WORDS[self.greedy.split]} ones"
        )

    def as_json(self, config: ColdStartConfig, task_names: dict[int, str]) -> dict[str, Any]:
        """Return the measurement and the decision, as plain values."""
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
        starts: starts of the episodes, see `probe_starts`.
        policy: the policy to measure.
        simulators: a pool whose slots are all free.
        temperature: temperature of the sampled episodes, above 0.
        seed: seed of the sampling noise.
        greedy: known greedy rates; None to roll out ``starts`` greedily.
    """

    def rates(at: float) -> Rates:
        config = EvaluationConfig(temperature=at)
        return Rates.of(evaluate(starts, policy, simulators, config=config, seed=seed), "train")

    sampled = rates(temperature)
    return Probe(
        greedy=rates(0.0) if greedy is None else greedy, sampled=sampled, temperature=temperature
    )


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
    tasks = list(by_task.values())
    if episodes < len(tasks):
        tasks = [tasks[i * len(tasks) // episodes] for i in range(episodes)]
    longest = max(map(len, tasks))
    in_turn = [task[lap] for lap in range(longest) for task in tasks if lap < len(task)]
    return tuple(in_turn[:episodes])


def keep(folder: Path, record: dict[str, Any]) -> None:
    """Write a probe's record into the run's folder, atomically."""
    atomic_write(folder / COLD_START_FILE, json.dumps(record, indent=1))


def was_passed(folder: Path) -> bool:
    """Check whether the policy of this run has already passed."""
    file = folder / COLD_START_FILE
    return file.exists() and bool(json.loads(file.read_text())["passed"])


def _counts(rate: SuccessRate | None) -> str:
    if rate is None:
        return "not played"
    crashed = f" ({rate.crashes} crashed)" if rate.crashes else ""
    return f"{rate.successes} of {rate.episodes}{crashed}"
